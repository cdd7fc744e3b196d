package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/parley-mls/parley/examples/internal/org"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/node/client"
)

// A step is one check of the play. Its function returns one line for the report and what the audience is shown.
type step struct {
	name string
	run  func(ctx context.Context, p *play) (detail string, lines []string, err error)
}

// steps in the order in which they are played. The names are those that -break takes.
var steps = []step{
	{"approve", stepApprove},
	{"enrol", stepEnrol},
	{"room", stepRoom},
	{"talk", stepTalk},
	{"join", stepJoin},
	{"restart", stepRestart},
	{"remove", stepRemove},
	{"revoke", stepRevoke},
}

// stepApprove creates the authorities, starts the nodes, and lets the operators approve each other by fingerprint.
// beta and gamma know each other's fingerprint only: where the other one is they learn by gossip from alpha.
func stepApprove(ctx context.Context, p *play) (string, []string, error) {
	if err := p.found(ctx); err != nil {
		return "", nil, err
	}
	var lines []string
	for _, o := range p.orgs {
		lines = append(lines, fmt.Sprintf("%-14s %s  root %s", o.Domain, o.Address, o.Fingerprint))
	}
	alpha, beta, gamma := p.orgs[0], p.orgs[1], p.orgs[2]
	for _, a := range []struct {
		by, peer *org.Org
		address  string
	}{
		{alpha, beta, beta.Address}, {alpha, gamma, gamma.Address},
		{beta, alpha, alpha.Address}, {gamma, alpha, alpha.Address},
		{beta, gamma, ""}, {gamma, beta, ""},
	} {
		f := a.peer.Fingerprint
		if p.broken("approve") && a.peer == gamma {
			f[0]++ // the fingerprint of another root
		}
		if err := a.by.Approve(ctx, a.peer, f, a.address); err != nil {
			return "", lines, fmt.Errorf("%s approves %s: %w", a.by.Domain, a.peer.Domain, err)
		}
	}
	for _, o := range p.orgs {
		if err := o.WaitPeers(ctx, len(p.orgs)-1, p.patience); err != nil {
			return "", lines, err
		}
	}
	return "3 authorities, 6 approvals, every node sees the 2 others", lines, nil
}

// stepEnrol gives four devices of three people their credentials, by invitation.
func stepEnrol(ctx context.Context, p *play) (string, []string, error) {
	var lines []string
	for _, d := range []struct {
		org          int
		user, device string
	}{{0, "alice", "alice-laptop"}, {0, "alice", "alice-phone"}, {1, "bob", "bob-phone"}, {2, "charlie", "charlie-laptop"}} {
		c, err := p.enrol(ctx, p.orgs[d.org], d.user, d.device)
		if err != nil {
			return "", lines, err
		}
		if p.broken("enrol") {
			// An invitation is good for one device: the second one must be refused.
			_, err := p.enrolWith(ctx, p.used, d.device+"-2")
			return "", lines, err
		}
		want := mimi.URI("mimi://" + p.orgs[d.org].Domain + "/u/" + d.user)
		if c.User() != want {
			return "", lines, fmt.Errorf("%s was enrolled as %s, want %s", d.device, c.User(), want)
		}
		lines = append(lines, fmt.Sprintf("%-28s %s", c.User(), c.ID()))
	}
	return "4 devices of 3 people hold X.509 credentials, KeyPackages are published", lines, nil
}

// stepRoom lets alice find the others by their handles, create a room and add them.
func stepRoom(ctx context.Context, p *play) (string, []string, error) {
	alice := p.device("alice-laptop")
	var found []mimi.URI
	for _, handle := range []string{"bob@beta.example", "charlie@gamma.example"} {
		u, err := alice.Find(ctx, handle)
		if err != nil {
			return "", nil, fmt.Errorf("find %s: %w", handle, err)
		}
		found = append(found, u)
	}
	room, err := alice.CreateRoom(ctx, "three organisations")
	if err != nil {
		return "", nil, fmt.Errorf("create the room: %w", err)
	}
	p.room = room.URI()
	if p.broken("room") {
		found = found[:1]
	}
	if err := room.Add(ctx, found...); err != nil {
		return "", nil, fmt.Errorf("add %v: %w", found, err)
	}
	lines, err := p.agree(ctx, "alice-laptop", "alice-phone", "bob-phone", "charlie-laptop")
	return fmt.Sprintf("%s, one epoch and one authenticator for 4 clients", p.room), lines, err
}

// stepTalk has everyone write and everyone decrypt.
func stepTalk(ctx context.Context, p *play) (string, []string, error) {
	all := []string{"alice-laptop", "alice-phone", "bob-phone", "charlie-laptop"}
	for _, d := range all {
		text := "hello from " + d
		if p.broken("talk") && d == "charlie-laptop" {
			text = "something else"
		}
		if err := p.say(ctx, d, text); err != nil {
			return "", nil, err
		}
	}
	var want []string
	for _, d := range all {
		want = append(want, d+": hello from "+d)
	}
	lines, err := p.transcripts(ctx, want, all...)
	return "4 messages, the same transcript for 4 clients", lines, err
}

// stepJoin has bob's new tablet join by external commit.
func stepJoin(ctx context.Context, p *play) (string, []string, error) {
	tablet, err := p.enrol(ctx, p.orgs[1], "bob", "bob-tablet")
	if err != nil {
		return "", nil, err
	}
	rooms, err := tablet.Joinable(ctx)
	if err != nil {
		return "", nil, fmt.Errorf("ask for rooms to join: %w", err)
	}
	if len(rooms) != 1 || rooms[0] != p.room {
		return "", nil, fmt.Errorf("the tablet may join %v, want %s", rooms, p.room)
	}
	target := rooms[0]
	if p.broken("join") {
		target = mimi.URI("mimi://alpha.example/r/another")
	}
	if _, err := tablet.Join(ctx, target); err != nil {
		return "", nil, fmt.Errorf("join %s: %w", target, err)
	}
	all := []string{"alice-laptop", "alice-phone", "bob-phone", "charlie-laptop", "bob-tablet"}
	lines, err := p.agree(ctx, all...)
	if err != nil {
		return "", lines, err
	}
	if err := p.say(ctx, "bob-tablet", "hello from bob-tablet"); err != nil {
		return "", lines, err
	}
	if _, err := p.transcripts(ctx, []string{"bob-tablet: hello from bob-tablet"}, all...); err != nil {
		return "", lines, err
	}
	return "bob's tablet joined by external commit and is heard by all", lines, nil
}

// stepRestart kills beta's node while the others go on, and starts it again.
func stepRestart(ctx context.Context, p *play) (string, []string, error) {
	beta := p.orgs[1]
	if err := beta.Kill(); err != nil {
		return "", nil, err
	}
	var want []string
	for i := range 10 {
		d := []string{"alice-laptop", "charlie-laptop"}[i%2]
		text := fmt.Sprintf("while beta is down %d", i)
		if err := p.say(ctx, d, text); err != nil {
			return "", nil, err
		}
		want = append(want, d+": "+text)
	}
	if _, err := p.transcripts(ctx, want, "alice-laptop", "alice-phone", "charlie-laptop"); err != nil {
		return "", nil, err
	}
	if got := p.texts("bob-phone"); len(got) > 0 && strings.Contains(got[len(got)-1], "while beta is down") {
		return "", nil, errors.New("bob got a message although his node is down")
	}
	if !p.broken("restart") {
		if err := beta.Start(ctx); err != nil {
			return "", nil, err
		}
	}
	began := time.Now()
	lines, err := p.transcripts(ctx, want, "bob-phone", "bob-tablet")
	if err != nil {
		return "", lines, err
	}
	return fmt.Sprintf("10 messages while beta was down, bob has them in order, once, %d ms after its start",
		time.Since(began).Milliseconds()), lines, nil
}

// stepRemove removes charlie and hands him a ciphertext of the next epoch.
func stepRemove(ctx context.Context, p *play) (string, []string, error) {
	room, err := p.device("alice-laptop").Room(p.room)
	if err != nil {
		return "", nil, err
	}
	charlie := p.device("charlie-laptop")
	if !p.broken("remove") {
		if err := room.Remove(ctx, charlie.User()); err != nil {
			return "", nil, fmt.Errorf("remove charlie: %w", err)
		}
	}
	const secret = "charlie can't read this"
	sealed, err := room.SealMessage([]byte(secret))
	if err != nil {
		return "", nil, err
	}
	if err := accepted(p.device("alice-laptop").SubmitRaw(ctx, p.room, sealed)); err != nil {
		return "", nil, err
	}
	if _, err := p.transcripts(ctx, []string{"alice-laptop: " + secret}, "alice-phone", "bob-phone", "bob-tablet"); err != nil {
		return "", nil, err
	}
	theirs, err := charlie.Room(p.room)
	if err != nil {
		return "", nil, err
	}
	opened, err := theirs.OpenRaw(sealed)
	if err == nil {
		return "", nil, fmt.Errorf("charlie's client decrypted %q", opened)
	}
	for _, text := range p.texts("charlie-laptop") {
		if strings.HasSuffix(text, secret) {
			return "", nil, errors.New("charlie's client has the message")
		}
	}
	return fmt.Sprintf("the others got it; charlie's client, handed the ciphertext: %v", err), nil, nil
}

// stepRevoke revokes bob's tablet at beta's authority and lets it try what a thief of the tablet would.
func stepRevoke(ctx context.Context, p *play) (string, []string, error) {
	alice, tablet := p.device("alice-laptop"), p.device("bob-tablet")
	stolen, err := tablet.Room(p.room)
	if err != nil {
		return "", nil, err
	}
	message, err := stolen.SealMessage([]byte("from the stolen tablet"))
	if err != nil {
		return "", nil, err
	}
	commit, err := stolen.StageUpdate(ctx)
	if err != nil {
		return "", nil, err
	}
	if !p.broken("revoke") {
		if err := p.orgs[1].Revoke(ctx, tablet.ID(), "the tablet was stolen"); err != nil {
			return "", nil, err
		}
	}
	var lines []string

	_, err = tablet.Find(ctx, "alice@alpha.example")
	if code := client.Code(err); code != "revoked" {
		return "", nil, fmt.Errorf("beta answered the tablet with %v, want revoked", err)
	}
	lines = append(lines, "beta refuses the tablet's token: "+err.Error())

	if err := p.waitRevoked(ctx, "alice-laptop", tablet.ID()); err != nil {
		return "", lines, err
	}
	reason, err := p.refused(ctx, alice, commit)
	if err != nil {
		return "", lines, err
	}
	lines = append(lines, "alpha refuses its commit: "+reason)

	message, err = client.Readdress(message, alice.User())
	if err != nil {
		return "", lines, err
	}
	discarded := p.watchDiscarded("alice-phone", "bob-phone")
	if err := accepted(alice.SubmitRaw(ctx, p.room, message)); err != nil {
		return "", lines, fmt.Errorf("the tablet's message brought to alpha: %w", err)
	}
	if err := discarded(ctx, tablet.ID()); err != nil {
		return "", lines, err
	}
	lines = append(lines, "receivers discard its message")

	rest := []string{"alice-laptop", "alice-phone", "bob-phone"}
	for _, d := range rest {
		if err := p.waitGone(ctx, d, tablet.ID()); err != nil {
			return "", lines, err
		}
	}
	agreed, err := p.agree(ctx, rest...)
	if err != nil {
		return "", lines, err
	}
	lines = append(append(lines, "the hub's Remove of it is committed"), agreed...)
	if err := p.say(ctx, "bob-phone", "my tablet is gone, I am not"); err != nil {
		return "", lines, err
	}
	if _, err := p.transcripts(ctx, []string{"bob-phone: my tablet is gone, I am not"}, rest...); err != nil {
		return "", lines, err
	}
	for _, d := range rest {
		for _, text := range p.texts(d) {
			if strings.Contains(text, "stolen") {
				return "", lines, fmt.Errorf("%s shows the tablet's message", d)
			}
		}
	}
	return "the tablet is shut out everywhere, bob's phone goes on", lines, nil
}

// agree waits until the devices are in one epoch with one authenticator, and shows both.
func (p *play) agree(ctx context.Context, devices ...string) ([]string, error) {
	var lines []string
	err := p.eventually(ctx, func() error {
		lines = lines[:0]
		var epoch uint64
		var authenticator []byte
		for i, d := range devices {
			r, err := p.device(d).Room(p.room)
			if err != nil {
				return fmt.Errorf("%s: %w", d, err)
			}
			lines = append(lines, fmt.Sprintf("%-14s epoch %d, authenticator %s", d, r.Epoch(), short(r.EpochAuthenticator())))
			if i == 0 {
				epoch, authenticator = r.Epoch(), r.EpochAuthenticator()
			} else if r.Epoch() != epoch || !bytes.Equal(r.EpochAuthenticator(), authenticator) {
				return fmt.Errorf("%s is in epoch %d, %s in %d", devices[0], epoch, d, r.Epoch())
			}
			n := 0
			for _, m := range r.Participants() {
				n += len(m.Clients)
			}
			if n != len(devices) {
				return fmt.Errorf("%s sees %d clients, want %d", d, n, len(devices))
			}
		}
		return nil
	})
	return lines, err
}

// transcripts waits until the newest messages of each device are want, in that order and once each.
func (p *play) transcripts(ctx context.Context, want []string, devices ...string) ([]string, error) {
	var lines []string
	for _, d := range devices {
		err := p.eventually(ctx, func() error {
			got := p.texts(d)
			if len(got) < len(want) {
				return fmt.Errorf("%s has %d messages: %s", d, len(got), quoted(got))
			}
			for i, w := range want {
				if g := got[len(got)-len(want)+i]; g != w {
					return fmt.Errorf("%s reads %q, want %q", d, g, w)
				}
			}
			seen := map[string]bool{}
			for _, g := range got {
				if seen[g] {
					return fmt.Errorf("%s has %q twice", d, g)
				}
				seen[g] = true
			}
			return nil
		})
		if err != nil {
			return lines, err
		}
		lines = append(lines, fmt.Sprintf("%-14s %s", d, quoted(want)))
	}
	return lines, nil
}
