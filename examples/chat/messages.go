package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"mime"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/parley-mls/parley/federation/mimi/content"
	"github.com/parley-mls/parley/node/client"
)

// shortID is what is shown of a message's ID, and enough to name it. The first octet is the same for all.
func shortID(id content.MessageID) string { return id.String()[2:10] }

// message finds a message of the room by the beginning of its ID.
func message(r *client.Room, name string) (client.Message, error) {
	name = strings.TrimPrefix(name, "#")
	var found []client.Message
	for after := uint64(0); ; {
		page, err := r.MessagesAfter(after, 256)
		if err != nil {
			return client.Message{}, err
		}
		if len(page) == 0 {
			break
		}
		for _, m := range page {
			after = m.Seq
			if m.Content != nil && name != "" && strings.HasPrefix(m.ID.String()[2:], name) {
				found = append(found, m)
			}
		}
	}
	if len(found) != 1 {
		return client.Message{}, fmt.Errorf("%d messages begin with %q: \"chat tail\" shows the IDs after #", len(found), name)
	}
	return found[0], nil
}

// about sends content about a message: args are the room, the message and a text.
func (s *session) about(ctx context.Context, args []string, compose func(r *client.Room, about client.Message, text string) *content.Message) error {
	return s.inRoom(ctx, args[0], func(ctx context.Context, _ *client.Client, r *client.Room) error {
		m, err := message(r, args[1])
		if err != nil {
			return err
		}
		_, err = r.SendContent(ctx, compose(r, m, strings.Join(args[2:], " ")))
		return queued(err)
	})
}

func queued(err error) error {
	if errors.Is(err, client.ErrQueued) {
		return fmt.Errorf("%w: the next command that connects sends it", err)
	}
	return err
}

func reply(ctx context.Context, s *session, args []string) error {
	return s.about(ctx, args, func(r *client.Room, to client.Message, text string) *content.Message {
		c := r.Compose(content.Text(text))
		c.InReplyTo, c.Topic = to.ID, to.Content.Topic
		return c
	})
}

func react(ctx context.Context, s *session, args []string) error {
	return s.about(ctx, args, func(r *client.Room, to client.Message, text string) *content.Message {
		c := r.Compose(content.React(text))
		c.InReplyTo = to.ID
		return c
	})
}

func edit(ctx context.Context, s *session, args []string) error {
	return s.about(ctx, args, func(r *client.Room, old client.Message, text string) *content.Message {
		p := content.Text(text)
		p.Disposition = old.Content.Body.Disposition // a reaction stays one
		return instead(r, old, p)
	})
}

func deleteMessage(ctx context.Context, s *session, args []string) error {
	return s.about(ctx, args, func(r *client.Room, old client.Message, _ string) *content.Message {
		return instead(r, old, content.Part{Disposition: old.Content.Body.Disposition})
	})
}

// instead is a message in the place of another, of which only the body differs.
func instead(r *client.Room, old client.Message, body content.Part) *content.Message {
	c := r.Compose(body)
	c.Topic, c.Expires, c.InReplyTo = old.Content.Topic, old.Content.Expires, old.Content.InReplyTo
	if c.Replaces = old.Content.Replaces; c.Replaces.IsZero() { // else the first version
		c.Replaces = old.ID
	}
	return c
}

func attach(ctx context.Context, s *session, args []string) error {
	return s.inRoom(ctx, args[0], func(ctx context.Context, c *client.Client, r *client.Room) error {
		f, err := os.Open(args[1])
		if err != nil {
			return err
		}
		defer f.Close()
		name := filepath.Base(args[1])
		part, err := c.Upload(ctx, f, cmp.Or(mime.TypeByExtension(filepath.Ext(name)), content.Bytes), name)
		if err != nil {
			return err
		}
		if text := strings.Join(args[2:], " "); text != "" {
			part = content.Part{
				Disposition: content.Render, Cardinality: content.MultiPart, Semantics: content.ProcessAll,
				Parts: []content.Part{content.Text(text), part},
			}
		}
		_, err = r.SendContent(ctx, r.Compose(part))
		return queued(err)
	})
}

func save(ctx context.Context, s *session, args []string) error {
	n := 1
	if len(args) > 3 {
		var err error
		if n, err = strconv.Atoi(args[3]); err != nil || n < 1 {
			return fmt.Errorf("%q isn't the number of a file", args[3])
		}
	}
	return s.inRoom(ctx, args[0], func(ctx context.Context, _ *client.Client, r *client.Room) error {
		m, err := message(r, args[1])
		if err != nil {
			return err
		}
		var files []*content.Part
		m.Content.Body.Walk(func(_ int, p *content.Part) bool {
			if p.External != nil {
				files = append(files, p)
			}
			return true
		})
		if n > len(files) {
			return fmt.Errorf("there are %d files with that message", len(files))
		}
		return r.Download(ctx, m.User, files[n-1], args[2])
	})
}

func report(ctx context.Context, s *session, args []string) error {
	return s.inRoom(ctx, args[0], func(ctx context.Context, _ *client.Client, r *client.Room) error {
		m, err := message(r, args[1])
		if err != nil {
			return err
		}
		return r.Report(ctx, m.User, client.Report{Note: strings.Join(args[2:], " "), Messages: []client.Message{m}})
	})
}

// print prints a message as it comes.
func (s *session) print(m client.Message, withRoom bool) {
	what := ": " + body(m)
	if c := m.Content; c != nil {
		switch replaced, to := shortID(c.Replaces), shortID(c.InReplyTo); {
		case c.Deletes():
			what = " deletes #" + replaced
		case !c.Replaces.IsZero():
			what = " edits #" + replaced + what
		case c.Reaction():
			what = " reacts to #" + to + what
		case !c.InReplyTo.IsZero():
			what = " replies to #" + to + what
		}
	}
	fmt.Fprintf(s.out, "%s%s\n", head(m, withRoom), what)
}

// printPost prints a message with what others have made of it.
func (s *session) printPost(p client.Post) {
	line := head(p.Message, false)
	if c := p.Content; c != nil && !c.InReplyTo.IsZero() {
		line += " replies to #" + shortID(c.InReplyTo)
	}
	switch {
	case p.Deleted:
		line += ": (deleted)"
	case p.Edited:
		line += ": " + body(p.Message) + " (edited)"
	default:
		line += ": " + body(p.Message)
	}
	for _, m := range p.Reactions {
		line += fmt.Sprintf(" [%s %s@%s]", printable(string(m.Data)), m.User.ID(), m.User.Domain())
	}
	fmt.Fprintln(s.out, line)
}

// head is when and by whom a message is, and what to beware of.
func head(m client.Message, withRoom bool) string {
	h := m.Time.Local().Format(time.TimeOnly)
	if withRoom {
		h += " " + m.Room.ID()
	}
	if m.Content != nil {
		h += " #" + shortID(m.ID)
	}
	h += " " + m.User.ID() + "@" + m.User.Domain()
	if m.Flag != "" {
		h += " (" + m.Flag + ")"
	}
	if m.GivenBy != "" {
		h += " (says " + m.GivenBy.ID() + ")"
	}
	if m.FrankFault != "" {
		h += " (can't be reported: " + printable(m.FrankFault) + ")"
	}
	return h
}

// body is the text of a message, and its attachments by their names.
func body(m client.Message) string {
	text := printable(string(m.Data))
	if m.Content == nil {
		return text
	}
	if c := &m.Content.Body; c.Cardinality == content.SinglePart {
		if _, ok := c.Text(); !ok {
			return "[" + printable(c.ContentType) + "]"
		}
	}
	m.Content.Body.Walk(func(_ int, p *content.Part) bool {
		if p.External != nil {
			text += fmt.Sprintf(" [%s %s, %d bytes]", printable(p.ContentType), printable(p.External.Filename), p.External.Size)
		}
		return true
	})
	return text
}
