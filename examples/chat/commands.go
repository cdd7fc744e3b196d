package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/node/client"
)

// A command is what the user asks for. It takes min to max arguments; max < 0 is any number.
type command struct {
	min, max int
	run      func(ctx context.Context, s *session, args []string) error
}

func (c command) takes(n int) bool { return n >= c.min && (c.max < 0 || n <= c.max) }

var commands = map[string]command{
	"enrol":    {2, 2, enrol},
	"rooms":    {0, 0, rooms},
	"new":      {1, -1, create},
	"add":      {2, -1, add},
	"role":     {3, 3, setRole},
	"rename":   {2, -1, rename},
	"topic":    {1, -1, topic},
	"rules":    {1, 1, rules},
	"link":     {1, -1, link},
	"links":    {1, 1, links},
	"unlink":   {2, 2, unlink},
	"remove":   {2, 2, remove},
	"join":     {1, 1, join},
	"send":     {2, -1, send},
	"reply":    {3, -1, reply},
	"edit":     {3, -1, edit},
	"delete":   {2, 2, deleteMessage},
	"react":    {3, 3, react},
	"report":   {2, -1, report},
	"attach":   {2, -1, attach},
	"save":     {3, 4, save},
	"tail":     {0, 3, tail},
	"members":  {1, 1, members},
	"history":  {1, 3, history},
	"leave":    {1, 1, leave},
	"typing":   {1, 2, typing},
	"read":     {1, 1, read},
	"search":   {2, -1, search},
	"profile":  {0, 2, profile},
	"consent":  {0, 3, consent},
	"evidence": {0, 1, evidence},
}

var errUsage = errors.New("wrong arguments")

// session is one run of the program.
type session struct {
	o       client.Options
	out     io.Writer
	timeout time.Duration
}

// connected opens the device, runs it until act returns, and closes it.
func (s *session) connected(ctx context.Context, act func(ctx context.Context, c *client.Client) error) error {
	c, err := client.Open(ctx, s.o)
	if errors.Is(err, client.ErrNotEnrolled) {
		return fmt.Errorf("no device in %s: enrol one with \"chat -dir %s enrol INVITATION DEVICE\"", s.o.Dir, s.o.Dir)
	}
	if err != nil {
		return err
	}
	running, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- c.Run(running) }()
	acting, cancel := context.WithCancelCause(ctx)
	go func() {
		err := <-ended
		cancel(err) // a device that was revoked has nothing to wait for
		ended <- err
	}()
	err = act(acting, c)
	if cause := context.Cause(acting); err != nil && errors.Is(cause, client.ErrRevoked) {
		err = cause
	}
	stop()
	<-ended
	return errors.Join(err, c.Close())
}

// live is connected within the time-out, and caught up with the node.
func (s *session) live(ctx context.Context, act func(ctx context.Context, c *client.Client) error) error {
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	return s.connected(ctx, func(ctx context.Context, c *client.Client) error {
		if err := c.WaitLive(ctx); err != nil {
			return err
		}
		return act(ctx, c)
	})
}

// inRoom is live, in a room of which this device is a member, with what others proposed committed.
func (s *session) inRoom(ctx context.Context, name string, act func(ctx context.Context, c *client.Client, r *client.Room) error) error {
	return s.live(ctx, func(ctx context.Context, c *client.Client) error {
		r, err := find(ctx, c, name)
		if err != nil {
			return err
		}
		if err := r.CommitPending(ctx); err != nil && !errors.Is(err, client.ErrNotMember) {
			return err
		}
		err = act(ctx, c, r)
		if reason := r.HubFault(); reason != "" {
			s.warn(r.URI(), "", reason)
		}
		return err
	})
}

// warn says that people in a room may see different things.
func (s *session) warn(room, said mimi.URI, reason string) {
	by := ""
	if said != "" {
		by = ", as a message of " + said.ID() + " shows"
	}
	fmt.Fprintf(s.out, "* WARNING: what you see of room %s may not be what others see. %s%s. The room is hosted by %s.\n", room.ID(), sentence(reason), by, room.Domain())
}

func sentence(s string) string { return strings.ToUpper(s[:1]) + printable(s[1:]) }

// arrival is how long a command waits for what may still be on its way from another provider.
const arrival = 5 * time.Second

// find returns the room of a URI or of the beginning of its name. It waits a little for a room that this device may
// just have been added to.
func find(ctx context.Context, c *client.Client, name string) (*client.Room, error) {
	ctx, cancel := context.WithTimeout(ctx, arrival)
	defer cancel()
	events := c.Events()
	for {
		var found []*client.Room
		for _, r := range c.Rooms() {
			if string(r.URI()) == name || strings.HasPrefix(r.URI().ID(), name) {
				found = append(found, r)
			}
		}
		switch {
		case len(found) == 1:
			return found[0], nil
		case len(found) > 1:
			return nil, fmt.Errorf("%d rooms begin with %q", len(found), name)
		}
		select {
		case <-events:
		case <-ctx.Done():
			return nil, fmt.Errorf("no room %q: \"chat rooms\" lists them", name)
		}
	}
}

// person returns the user of a handle or URI.
func person(ctx context.Context, c *client.Client, name string) (mimi.URI, error) {
	if strings.HasPrefix(name, "mimi://") {
		return mimi.ParseURI(name)
	}
	return c.Find(ctx, name)
}

func enrol(ctx context.Context, s *session, args []string) error {
	inv, err := authority.ParseInvitation(args[0])
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	c, err := client.Enrol(ctx, s.o, inv, args[1])
	if err != nil {
		return err
	}
	fmt.Fprintf(s.out, "%s is %s of %s\n", s.o.Dir, c.ID(), c.User())
	return c.Close()
}

func rooms(ctx context.Context, s *session, _ []string) error {
	return s.live(ctx, func(ctx context.Context, c *client.Client) error {
		for _, r := range c.Rooms() {
			state := fmt.Sprintf("%d people", len(r.Participants()))
			if err := r.Frozen(); err != nil {
				state = errorText(err)
			} else if !r.Active() {
				state = "left"
			}
			title := printable(r.Name())
			if t := r.Metadata().Subject; t != "" {
				title += ": " + printable(t)
			}
			fmt.Fprintf(s.out, "%s  %s  (%s)\n", r.URI(), title, state)
			if reason := r.HubFault(); reason != "" {
				s.warn(r.URI(), "", reason)
			}
		}
		more, err := c.Joinable(ctx)
		if err != nil {
			return err
		}
		for _, uri := range more {
			fmt.Fprintf(s.out, "%s  (not on this device; chat join %s)\n", uri, uri.ID())
		}
		return nil
	})
}

func remove(ctx context.Context, s *session, args []string) error {
	return s.inRoom(ctx, args[0], func(ctx context.Context, c *client.Client, r *client.Room) error {
		u, err := person(ctx, c, args[1])
		if err != nil {
			return err
		}
		return r.Remove(ctx, u)
	})
}

func send(ctx context.Context, s *session, args []string) error {
	return s.inRoom(ctx, args[0], func(ctx context.Context, _ *client.Client, r *client.Room) error {
		_, err := r.Send(ctx, []byte(strings.Join(args[1:], " ")))
		return queued(err)
	})
}

func leave(ctx context.Context, s *session, args []string) error {
	return s.inRoom(ctx, args[0], func(ctx context.Context, _ *client.Client, r *client.Room) error {
		return r.Leave(ctx)
	})
}

func tail(ctx context.Context, s *session, args []string) error {
	flags := flag.NewFlagSet("tail", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	n := flags.Int("n", 0, "print the last `N` messages and exit")
	if flags.Parse(args) != nil || flags.NArg() > 1 || *n < 0 || *n > 0 && flags.NArg() == 0 {
		return errUsage
	}
	if *n > 0 {
		return s.inRoom(ctx, flags.Arg(0), func(ctx context.Context, c *client.Client, r *client.Room) error {
			return s.last(ctx, c, r, *n)
		})
	}
	return s.connected(ctx, func(ctx context.Context, c *client.Client) error {
		return s.follow(ctx, c, flags.Arg(0))
	})
}

// last prints the last n messages of a room; it waits a little if there are fewer yet.
func (s *session) last(ctx context.Context, c *client.Client, r *client.Room, n int) error {
	ctx, cancel := context.WithTimeout(ctx, arrival)
	defer cancel()
	events := c.Events()
	for {
		list, err := r.LastMessages(0, n)
		if err != nil {
			return err
		}
		if len(list) >= n || ctx.Err() != nil {
			break
		}
		select {
		case <-events:
		case <-ctx.Done():
		}
	}
	gaps, err := r.Gaps()
	if err != nil {
		return err
	}
	posts, err := r.LastPosts(0, n)
	if err != nil {
		return err
	}
	for i, p := range posts {
		for len(gaps) > 0 && gaps[0].Next <= p.Seq {
			if i > 0 {
				s.gap(gaps[0])
			}
			gaps = gaps[1:]
		}
		s.printPost(p)
		if err := r.MarkRead(p.Message); err != nil {
			return err
		}
	}
	for _, g := range gaps {
		s.gap(g)
	}
	return nil
}

// gap says that a part of a room's log never came to this device.
func (s *session) gap(g client.Gap) {
	fmt.Fprintf(s.out, "* this device was away from %s for too long, and what was said in between isn't here: after entry %d, before %d\n", g.Room.ID(), g.After, g.Next)
}

// follow prints what comes in a room, or in all, until the user interrupts.
func (s *session) follow(ctx context.Context, c *client.Client, name string) error {
	events := c.Events()
	if err := c.WaitLive(ctx); err != nil {
		return err
	}
	var only mimi.URI
	if name != "" {
		r, err := find(ctx, c, name)
		if err != nil {
			return err
		}
		only = r.URI()
	}
	for {
		select {
		case e, ok := <-events:
			if !ok {
				return nil
			}
			s.show(e, only)
			if m, ok := e.(client.Message); ok && (only == "" || only == m.Room) {
				if r, err := c.Room(m.Room); err == nil {
					if err := r.MarkRead(m); err != nil {
						return err
					}
				}
			}
		case <-ctx.Done():
			if errors.Is(context.Cause(ctx), client.ErrRevoked) {
				return context.Cause(ctx)
			}
			return nil
		}
	}
}

// typing tells who is connected that this user writes, or with "off" that not any more.
func typing(ctx context.Context, s *session, args []string) error {
	if len(args) == 2 && args[1] != "off" {
		return errUsage
	}
	return s.inRoom(ctx, args[0], func(ctx context.Context, _ *client.Client, r *client.Room) error {
		return r.Typing(ctx, len(args) == 1)
	})
}

// read tells who is connected that this user has seen all messages of a room.
func read(ctx context.Context, s *session, args []string) error {
	return s.inRoom(ctx, args[0], func(ctx context.Context, _ *client.Client, r *client.Room) error {
		list, err := r.LastMessages(0, 1)
		if err != nil || len(list) == 0 {
			return err
		}
		return r.Receipt(ctx, list[len(list)-1].Seq)
	})
}

func (s *session) show(e client.Event, only mimi.URI) {
	in := func(room mimi.URI) bool { return only == "" || only == room }
	switch e := e.(type) {
	case client.Message:
		if in(e.Room) {
			s.print(e, only == "")
		}
	case client.MemberAdded:
		if in(e.Room) {
			fmt.Fprintf(s.out, "* %s of %s joined %s\n", e.Client.ID(), e.User, e.Room.ID())
		}
	case client.MemberRemoved:
		if in(e.Room) {
			fmt.Fprintf(s.out, "* %s of %s is out of %s\n", e.Client.ID(), e.User, e.Room.ID())
		}
	case client.Typing:
		if in(e.Room) && e.On {
			fmt.Fprintf(s.out, "* %s is writing in %s\n", e.User, e.Room.ID())
		}
	case client.Receipt:
		if in(e.Room) {
			fmt.Fprintf(s.out, "* %s has seen %s up to message %d\n", e.User, e.Room.ID(), e.Seq)
		}
	case client.Joined:
		if in(e.Room) {
			fmt.Fprintf(s.out, "* this device joined %s\n", e.Room)
		}
	case client.Removed:
		if in(e.Room) {
			fmt.Fprintf(s.out, "* this device is out of %s\n", e.Room)
		}
	case client.Discarded:
		if in(e.Room) {
			fmt.Fprintf(s.out, "* discarded a message of %q: %s\n", e.Client, printable(e.Reason))
		}
	case client.HistoryOffered:
		if in(e.Room) {
			fmt.Fprintf(s.out, "* %s gives this device what was said in %s before. \"chat history %s\" takes it.\n", e.Client.ID(), e.Room.ID(), e.Room.ID())
		}
	case client.HubFault:
		s.warn(e.Room, e.Client, e.Reason)
		if e.Evidence != nil {
			fmt.Fprintf(s.out, "* %s has signed both. \"chat evidence\" lists the proof.\n", e.Room.Domain())
		}
	case client.HubRestored:
		lost := ""
		if e.Lost {
			lost = ", and some of what you have of this room isn't there any more"
		}
		fmt.Fprintf(s.out, "* %s, which hosts %s, was restored from an older copy%s\n", e.Room.Domain(), e.Room.ID(), lost)
	case client.Gap:
		if in(e.Room) {
			s.gap(e)
		}
	case client.ConsentChanged:
		s.consent(e.Consent)
	case client.Frozen:
		if in(e.Room) {
			fmt.Fprintf(s.out, "* %s\n", errorText(e.Err))
		}
	}
}

// evidence lists what this device has against hubs, or prints one piece of it.
func evidence(ctx context.Context, s *session, args []string) error {
	return s.connected(ctx, func(_ context.Context, c *client.Client) error {
		list, err := c.Evidence()
		if err != nil {
			return err
		}
		var found []client.Evidence
		for _, e := range list {
			if len(args) == 0 {
				fmt.Fprintf(s.out, "%.12s  %s has signed two logs of %s, up to the entries %d and %d\n", e.ID, e.Room.Domain(), e.Room, e.First, e.Second)
			} else if strings.HasPrefix(e.ID, args[0]) {
				found = append(found, e)
			}
		}
		if len(args) == 0 {
			return nil
		}
		if len(found) != 1 {
			return fmt.Errorf("%d pieces of evidence begin with %q", len(found), args[0])
		}
		_, err = s.out.Write(found[0].File)
		return err
	})
}

// errorText is an error on one line; a hub's words may be in it.
func errorText(err error) string { return printable(strings.ReplaceAll(err.Error(), "\n", "; ")) }

// printable replaces what could steer a terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '\uFFFD'
		}
		return r
	}, s)
}
