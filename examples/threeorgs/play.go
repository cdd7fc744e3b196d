package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/examples/internal/org"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/node/client"
)

// A play holds the organisations and the devices of one performance.
type play struct {
	dir       string
	temporary bool
	sabotage  string
	patience  time.Duration
	log       *slog.Logger
	orgs      []*org.Org
	room      mimi.URI
	used      authority.Invitation // the last one enrolled with

	devices map[string]*client.Client
	stop    context.CancelFunc
	ctx     context.Context
	running sync.WaitGroup
}

func newPlay(dir, sabotage string, patience time.Duration, log *slog.Logger) (*play, error) {
	p := &play{dir: dir, sabotage: sabotage, patience: patience, log: log, devices: map[string]*client.Client{}}
	if dir == "" {
		tmp, err := os.MkdirTemp("", "parley-threeorgs-")
		if err != nil {
			return nil, fmt.Errorf("make a temporary directory: %w", err)
		}
		p.dir, p.temporary = tmp, true
	} else if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory: %w", err)
	}
	p.ctx, p.stop = context.WithCancel(context.Background())
	for _, domain := range []string{"alpha.example", "beta.example", "gamma.example"} {
		p.orgs = append(p.orgs, &org.Org{Domain: domain, Dir: filepath.Join(p.dir, strings.TrimSuffix(domain, ".example"))})
	}
	return p, nil
}

// close ends the devices and the nodes, and removes a temporary directory.
func (p *play) close() {
	p.stop()
	p.running.Wait()
	for _, c := range p.devices {
		c.Close()
	}
	for _, o := range p.orgs {
		o.Terminate()
	}
	if p.temporary {
		os.RemoveAll(p.dir)
	}
}

func (p *play) broken(step string) bool { return p.sabotage == step }

// found creates the three authorities and starts the three nodes, side by side.
func (p *play) found(ctx context.Context) error {
	errs := make([]error, len(p.orgs))
	var wg sync.WaitGroup
	for i, o := range p.orgs {
		wg.Go(func() {
			if errs[i] = o.Init(""); errs[i] == nil {
				errs[i] = o.Start(ctx)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// enrol invites user at o and makes a device of theirs with the invitation.
func (p *play) enrol(ctx context.Context, o *org.Org, user, device string) (*client.Client, error) {
	inv, err := o.Invite(ctx, user)
	if err != nil {
		return nil, fmt.Errorf("invite %s at %s: %w", user, o.Domain, err)
	}
	return p.enrolWith(ctx, inv, device)
}

func (p *play) enrolWith(ctx context.Context, inv authority.Invitation, device string) (*client.Client, error) {
	p.used = inv
	c, err := client.Enrol(ctx, client.Options{
		Dir: filepath.Join(p.dir, "devices", device),
		Log: p.log.With("device", device),
		// Long enough that the tablet's last message comes before the commit that removes it.
		CommitDelay: func() time.Duration { return time.Second },
	}, inv, device)
	if err != nil {
		return nil, fmt.Errorf("enrol %s: %w", device, err)
	}
	p.devices[device] = c
	p.running.Go(func() { c.Run(p.ctx) })
	return c, nil
}

func (p *play) device(name string) *client.Client { return p.devices[name] }

// say has a device write to the room; it returns when the hub has the message.
func (p *play) say(ctx context.Context, device, text string) error {
	r, err := p.device(device).Room(p.room)
	if err != nil {
		return fmt.Errorf("%s: %w", device, err)
	}
	ctx, cancel := context.WithTimeout(ctx, p.patience)
	defer cancel()
	if _, err := r.Send(ctx, []byte(text)); err != nil {
		return fmt.Errorf("%s sends: %w", device, err)
	}
	return nil
}

// texts is what a device has in the room, "device: text" each, in its order.
func (p *play) texts(device string) []string {
	r, err := p.device(device).Room(p.room)
	if err != nil {
		return nil
	}
	var texts []string
	for _, m := range r.Messages() {
		texts = append(texts, m.Client.ID()+": "+string(m.Data))
	}
	return texts
}

// eventually waits until check finds nothing wrong, as long as the patience lasts.
func (p *play) eventually(ctx context.Context, check func() error) error {
	deadline := time.NewTimer(p.patience)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-deadline.C:
			return fmt.Errorf("not within %v: %w", p.patience, err)
		case <-tick.C:
		}
	}
}

// member looks a client up as device sees it in the room.
func (p *play) member(device string, id mimi.URI) (client.Member, bool) {
	r, err := p.device(device).Room(p.room)
	if err != nil {
		return client.Member{}, false
	}
	for _, u := range r.Participants() {
		for _, m := range u.Clients {
			if m.Client == id {
				return m, true
			}
		}
	}
	return client.Member{}, false
}

// waitRevoked waits until device has learnt that the client with this id is revoked.
func (p *play) waitRevoked(ctx context.Context, device string, id mimi.URI) error {
	return p.eventually(ctx, func() error {
		if m, ok := p.member(device, id); !ok || m.Flag != "revoked" {
			return fmt.Errorf("%s doesn't know that %s is revoked", device, id)
		}
		return nil
	})
}

// waitGone waits until the client with this id is no member any more in device's view.
func (p *play) waitGone(ctx context.Context, device string, id mimi.URI) error {
	return p.eventually(ctx, func() error {
		if _, ok := p.member(device, id); ok {
			return fmt.Errorf("%s still has %s in the room", device, id)
		}
		return nil
	})
}

// refused brings a handshake to the room's hub through carrier and returns why it isn't accepted.
func (p *play) refused(ctx context.Context, carrier *client.Client, handshake []byte) (string, error) {
	answer, err := carrier.UpdateRaw(ctx, p.room, handshake)
	if err != nil {
		return "", fmt.Errorf("bring the commit to alpha: %w", err)
	}
	if answer.Code == mimi.UpdateSuccess {
		return "", errors.New("alpha accepted the revoked tablet's commit")
	}
	if answer.Code != mimi.UpdateNotAllowed {
		return "", fmt.Errorf("alpha refused the commit for another reason: %v %s", answer.Code, answer.Description)
	}
	return answer.Description, nil
}

// watchDiscarded listens on the devices; the function it returns waits until each has discarded a message of id.
func (p *play) watchDiscarded(devices ...string) func(ctx context.Context, id mimi.URI) error {
	var events []<-chan client.Event
	for _, d := range devices {
		events = append(events, p.device(d).Events())
	}
	return func(ctx context.Context, id mimi.URI) error {
		ctx, cancel := context.WithTimeout(ctx, p.patience)
		defer cancel()
		for i, ch := range events {
			for found := false; !found; {
				select {
				case <-ctx.Done():
					return fmt.Errorf("%s didn't discard the message of %s", devices[i], id)
				case e := <-ch:
					d, ok := e.(client.Discarded)
					found = ok && d.Client == id
				}
			}
		}
		return nil
	}
}

// accepted turns an answer that isn't an acceptance into an error.
func accepted(answer *mimi.SubmitMessageResponse, err error) error {
	if err != nil {
		return err
	}
	if answer.Code != mimi.SubmitAccepted {
		return fmt.Errorf("the hub refused the message: %v", answer.Code)
	}
	return nil
}

// keep leaves everything up until the end of ctx: another terminal can enrol as dora with the commands that it
// prints, alice adds her to the room, and what is said there is shown.
func (p *play) keep(ctx context.Context, w io.Writer) {
	alice := p.device("alice-laptop")
	room, err := alice.Room(p.room)
	if err != nil {
		fmt.Fprintf(w, "%v\n", err)
		return
	}
	inv, err := p.orgs[1].Invite(ctx, "dora")
	if err != nil {
		fmt.Fprintf(w, "invite dora: %v\n", err)
		return
	}
	chat := "go run ./examples/chat -dir " + filepath.Join(p.dir, "devices", "dora")
	fmt.Fprintf(w, "\nThe nodes stay up until Ctrl-C; all state is in %s. Join as dora of beta.example, in another terminal:\n\n", p.dir)
	fmt.Fprintf(w, "  %s enrol '%s' dora-laptop\n", chat, inv)
	fmt.Fprintf(w, "  %s tail -n 10 %s\n", chat, p.room)
	fmt.Fprintf(w, "  %s send %s 'hello, I am dora'\n\nThe nodes answer to their operators:\n\n", chat, p.room)
	for _, o := range p.orgs {
		fmt.Fprintf(w, "  go run ./node/cmd/parley-node status -data %s\n", o.Dir)
	}
	fmt.Fprintln(w)

	events := alice.Events()
	enrolled := time.NewTicker(time.Second)
	defer enrolled.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-enrolled.C:
			if err := room.Add(ctx, inv.User); err == nil {
				fmt.Fprintln(w, "alice added dora to the room")
				enrolled.Stop()
			}
		case e, ok := <-events:
			if !ok {
				return
			}
			if m, ok := e.(client.Message); ok {
				fmt.Fprintf(w, "%s: %s\n", m.Client.ID(), m.Data)
			}
		}
	}
}
