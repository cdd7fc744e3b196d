package client

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/federation/mimi/content"
	"github.com/parley-mls/parley/node"
)

// The example rooms of draft-ietf-mimi-room-policy-03, Appendix A, by people of three organisations.
func TestTheExampleRoomsPlayedThrough(t *testing.T) {
	p := providers(t, "alpha", "beta", "gamma")
	s := &stage{
		t: t, alice: p[0].enrol("alice", "alice-laptop"), bob: p[1].enrol("bob", "bob-phone"),
		carol: p[2].enrol("carol", "carol-pc"), dave: p[0].enrol("dave", "dave-tablet"), hub: p[0],
	}
	for _, room := range []struct {
		name string
		play func(s *stage)
	}{
		{"cooperative", cooperative}, {"strict", strict}, {"moderated", moderated}, {"of several organisations", organisations},
	} {
		t.Run(room.name, func(t *testing.T) {
			s.t = t
			room.play(s)
		})
	}
}

// stage is where a room is played: alice, of its hub's organisation, makes it; bob and carol are of two others, dave of hers.
type stage struct {
	t                       *testing.T
	alice, bob, carol, dave *device
	hub                     *provider
	uri                     mimi.URI
	room                    *Room // alice's
}

func (s *stage) create(rules func(hub mimi.URI) mimi.Rules) {
	s.t.Helper()
	var err error
	if s.room, err = s.alice.CreateRoomWith(s.t.Context(), "club", rules); err != nil {
		s.t.Fatal(err)
	}
	s.uri = s.room.URI()
}

// in is the room of a device that is or will be in it.
func (s *stage) in(d *device) *Room { return d.room(s.uri) }

// works fails the test if something that the rules allow fails.
func (s *stage) works(what string, err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatalf("%s: %v", what, err)
	}
}

// forbidden fails the test unless something is refused for what the rules say.
func (s *stage) forbidden(what string, err error) {
	s.t.Helper()
	if _, ok := errors.AsType[*mimi.PolicyError](err); !ok && !errors.Is(err, ErrNoRight) && Code(err) != "notAllowed" {
		s.t.Errorf("%s: %v", what, err)
	}
}

// has waits until all who are named see a user in a role, by its name; "" is nobody.
func (s *stage) has(user *device, role string, seenBy ...*device) {
	s.t.Helper()
	for _, d := range seenBy {
		within(s.t, func() error {
			if got := roleName(s.in(d), user.User()); got != role {
				return fmt.Errorf("%s sees %s as %q, want %q", d.ID(), user.User(), got, role)
			}
			return nil
		})
	}
}

func roleName(r *Room, user mimi.URI) string {
	rules, err := r.Rules()
	if err != nil {
		return err.Error()
	}
	for _, p := range r.Participants() {
		if p.User == user {
			if role := rules.Roles.Find(p.Role); role != nil {
				return role.Name
			}
			return "?"
		}
	}
	return ""
}

func (s *stage) role(name string) uint32 {
	s.t.Helper()
	rules, err := s.room.Rules()
	if err != nil || rules.Roles.Named(name) == nil {
		s.t.Fatalf("no role %s: %v", name, err)
	}
	return rules.Roles.Named(name).Index
}

func (s *stage) agree(devices ...*device) {
	s.t.Helper()
	agree(s.t, s.uri, devices...)
}

// out waits until a device knows that it isn't in the room any more.
func (s *stage) out(d *device) {
	s.t.Helper()
	within(s.t, func() error {
		if r, err := d.Room(s.uri); err != nil || r.Active() {
			return fmt.Errorf("%s is in the room: %v", d.ID(), err)
		}
		return nil
	})
}

// discards returns what waits until alice discards the next message of carol's, other than one that was seen before.
func (s *stage) discards() func(what string, seen content.MessageID) {
	events := s.alice.Events()
	return func(what string, seen content.MessageID) {
		s.t.Helper()
		for {
			select {
			case e := <-events:
				if d, ok := e.(Discarded); ok && d.Room == s.uri {
					return
				} else if m, ok := e.(Message); ok && m.Room == s.uri && m.User == s.carol.User() && m.ID != seen {
					s.t.Fatalf("%s is taken: %q", what, m.Data)
				}
			case <-time.After(patience):
				s.t.Fatalf("%s isn't seen", what)
			}
		}
	}
}

func (s *stage) names(r *Room, name string) error {
	return r.ChangeMetadata(s.t.Context(), func(m *mimi.RoomMetadata) { m.RoomName = name })
}

// Whoever is in adds and removes others.
func cooperative(s *stage) {
	ctx := s.t.Context()
	s.create(mimi.CooperativeRoom)
	s.works("the creator adds", s.room.Add(ctx, s.bob.User()))
	s.works("a user adds", s.in(s.bob).Add(ctx, s.carol.User()))
	s.works("a user of the hub's organisation is added", s.in(s.carol).Add(ctx, s.dave.User()))
	s.agree(s.alice, s.bob, s.carol, s.dave)
	s.has(s.carol, "ordinary_user", s.alice, s.dave)
	s.works("a user renames the room", s.names(s.in(s.carol), "friends"))
	s.agree(s.alice, s.bob, s.carol, s.dave)
	if m := s.in(s.bob).Metadata(); m.RoomName != "friends" {
		s.t.Errorf("the room is called %q", m.RoomName)
	}
	s.forbidden("a user describes it", s.in(s.bob).ChangeMetadata(ctx, func(m *mimi.RoomMetadata) {
		m.Descriptions = []mimi.RichDescription{{Content: []byte("ours")}}
	}))
	s.forbidden("a user bans", s.in(s.bob).SetRole(ctx, s.carol.User(), mimi.RoleBanned))
	s.forbidden("a user makes itself an admin", s.in(s.bob).SetRole(ctx, s.bob.User(), s.role("group_admin")))
	if _, err := s.room.CreateLink(ctx, LinkOptions{}); err == nil {
		s.t.Error("a link to a room that nobody joins by a link")
	}
	if _, err := s.bob.Join(ctx, s.uri); err != nil {
		s.t.Errorf("who is in joins: %v", err)
	}
	s.works("a user removes another", s.in(s.bob).Remove(ctx, s.dave.User()))
	s.agree(s.alice, s.bob, s.carol)
	s.out(s.dave)
	if _, err := s.dave.Join(ctx, s.uri); err == nil {
		s.t.Error("who was removed joins")
	}
	s.works("the creator makes an admin", s.room.SetRole(ctx, s.bob.User(), s.role("group_admin")))
	s.has(s.bob, "group_admin", s.bob, s.carol)
	s.works("an admin bans", s.in(s.bob).SetRole(ctx, s.carol.User(), mimi.RoleBanned))
	s.agree(s.alice, s.bob)
	s.has(s.carol, "banned", s.alice, s.bob)
	s.out(s.carol)
	if _, err := s.carol.Join(ctx, s.uri); err == nil {
		s.t.Error("who is banned joins")
	}
	s.forbidden("who is banned is added", s.in(s.bob).Add(ctx, s.carol.User()))
	s.works("an admin unbans", s.in(s.bob).SetRole(ctx, s.carol.User(), s.role("ordinary_user")))
	if _, err := s.carol.Join(ctx, s.uri); err != nil {
		s.t.Fatalf("who is unbanned joins: %v", err)
	}
	s.agree(s.alice, s.bob, s.carol)
	s.works("a user leaves", s.in(s.carol).Leave(ctx))
	s.agree(s.alice, s.bob)
}

// Only admins add and remove; links let others in.
func strict(s *stage) {
	ctx := s.t.Context()
	s.create(func(hub mimi.URI) mimi.Rules {
		rules := mimi.StrictRoom(hub)
		rules.JoinLinks = &mimi.JoinLinkPolicy{MultiUser: true, Expiration: 3600}
		return rules
	})
	s.works("the creator adds", s.room.Add(ctx, s.bob.User()))
	s.agree(s.alice, s.bob)
	s.has(s.bob, "ordinary_user", s.alice, s.bob)
	if rules, err := s.in(s.bob).Rules(); err != nil || rules.JoinLinks == nil || rules.JoinLinks.Expiration != 3600 || rules.Base != nil {
		s.t.Errorf("the rules are %+v, %v", rules, err)
	}
	s.forbidden("a user adds", s.in(s.bob).Add(ctx, s.carol.User()))
	s.forbidden("a user becomes an administrator", s.in(s.bob).SetRole(ctx, s.bob.User(), s.role("group_admin")))
	s.forbidden("a user renames the room", s.names(s.in(s.bob), "mine"))
	_, err := s.in(s.bob).CreateLink(ctx, LinkOptions{})
	s.forbidden("a user makes a link", err)
	_, err = s.room.CreateLink(ctx, LinkOptions{Lifetime: 2 * time.Hour})
	if refused, ok := errors.AsType[*Refused](err); !ok || !strings.Contains(refused.Description, "3600 s at most") {
		s.t.Errorf("a link that lasts too long: %v", err)
	}

	once, err := s.room.CreateLink(ctx, LinkOptions{Once: true})
	s.works("the creator makes a link", err)
	again, err := s.room.CreateLink(ctx, LinkOptions{Role: s.role("ordinary_user")})
	s.works("the creator makes another", err)
	s.agree(s.alice, s.bob)
	if _, err := s.carol.Join(ctx, s.uri); err == nil {
		s.t.Error("a stranger joins without a link")
	}
	read, err := ParseLink(" " + once.URL() + "\n")
	if err != nil || read.URL() != once.URL() || strings.Contains(fmt.Sprintf("%v %+v %#v %s", once, once, once, once), once.URL()[len(s.uri)+1:]) {
		s.t.Fatalf("a link is read as %v, %v", read, err)
	}
	if _, err := s.carol.JoinByLink(ctx, read); err != nil {
		s.t.Fatalf("joining by a link: %v", err)
	}
	s.agree(s.alice, s.bob, s.carol)
	s.has(s.carol, "ordinary_user", s.alice, s.carol)
	s.carol.say(s.uri, "hello")
	if _, err := s.dave.JoinByLink(ctx, once); err == nil {
		s.t.Error("a link for one lets a second in")
	}
	links, err := s.in(s.bob).Links()
	if err != nil || len(links) != 1 || !links[0].Key.Equal(again.Key()) || !links[0].MultiUser || links[0].Expires == 0 {
		s.t.Errorf("the room has the links %+v, %v", links, err)
	}
	s.forbidden("a user revokes a link", s.in(s.bob).RevokeLink(ctx, again.Key()))
	s.works("the creator revokes a link", s.room.RevokeLink(ctx, again.Key()))
	if _, err := s.dave.JoinByLink(ctx, again); err == nil {
		s.t.Error("a link that is revoked lets somebody in")
	}

	s.works("the creator makes an admin", s.room.SetRole(ctx, s.bob.User(), s.role("group_admin")))
	s.has(s.bob, "group_admin", s.bob)
	s.works("an admin adds", s.in(s.bob).Add(ctx, s.dave.User()))
	s.works("an admin sets the topic", s.in(s.bob).ChangeMetadata(ctx, func(m *mimi.RoomMetadata) { m.Subject = "soup" }))
	s.agree(s.alice, s.bob, s.carol, s.dave)
	if m := s.in(s.dave).Metadata(); m.Subject != "soup" || m.RoomName != "club" {
		s.t.Errorf("the room's metadata are %+v", m)
	}
	if err := s.room.SetRole(ctx, s.bob.User(), 77); err == nil {
		s.t.Error("a role that the room hasn't got is given")
	}
	if err := s.room.SetRole(ctx, "mimi://beta.example/u/nobody", s.role("group_admin")); err == nil {
		s.t.Error("somebody who isn't there gets a role")
	}
	sees(s.t, s.uri, []string{"carol-pc: hello"}, s.alice, s.bob)
}

// Guests and attendees listen and react, speakers speak, moderators say who is what and take down what isn't wanted.
func moderated(s *stage) {
	ctx := s.t.Context()
	s.create(mimi.ModeratedRoom)
	s.works("the creator adds a moderator", s.room.AddAs(ctx, s.role("moderator"), s.bob.User()))
	link, err := s.in(s.bob).CreateLink(ctx, LinkOptions{})
	s.works("a moderator makes a link", err)
	if _, err := s.carol.JoinByLink(ctx, link); err != nil {
		s.t.Fatalf("a guest joins by a link: %v", err)
	}
	s.agree(s.alice, s.bob, s.carol)
	s.has(s.carol, "guest", s.alice, s.bob, s.carol)
	s.alice.say(s.uri, "welcome")
	carol := s.in(s.carol)
	within(s.t, func() error {
		if len(carol.Messages()) != 1 {
			return errors.New("nothing to react to yet")
		}
		return nil
	})
	welcome := s.carol.last(s.uri, 1)
	compose := func(r *Room, body content.Part, edit func(m *content.Message)) *content.Message {
		m := r.Compose(body)
		edit(m)
		return m
	}
	send := func(r *Room, body content.Part, edit func(m *content.Message)) error {
		_, err := r.SendContent(ctx, compose(r, body, edit))
		return err
	}
	_, err = carol.Send(ctx, []byte("I too"))
	s.forbidden("a guest speaks", err)
	s.forbidden("a guest replies", send(carol, content.Text("x"), func(m *content.Message) { m.InReplyTo = welcome.ID }))
	s.forbidden("a guest starts a topic", send(carol, content.Text("x"), func(m *content.Message) { m.Topic = []byte("x") }))
	s.works("a guest reacts", send(carol, content.React("+1"), func(m *content.Message) { m.InReplyTo = welcome.ID }))
	s.forbidden("a guest reports", carol.Report(ctx, s.alice.User(), Report{Messages: []Message{welcome}}))

	// A client of hers that doesn't hold to it is held to it by the others and, as far as it sees, by the hub.
	carol.mu.Lock()
	carol.roleOf(s.carol.User())
	any := mimi.Role{Index: 99}
	for c := mimi.CanAddParticipant; c < mimi.CanChangeRoomName; c++ {
		any.Capabilities = append(any.Capabilities, c)
	}
	carol.cast.roles, carol.cast.of[s.carol.User()] = mimi.RoleList{any}, any.Index
	carol.mu.Unlock()
	if err := carol.Report(ctx, s.alice.User(), Report{Messages: []Message{welcome}}); Code(err) != "notAllowed" {
		s.t.Errorf("the hub takes a guest's report: %v", err)
	}
	discarded := s.discards()
	reaction := func() Message {
		for _, m := range s.in(s.alice).Messages() {
			if m.User == s.carol.User() {
				return m
			}
		}
		return Message{}
	}
	within(s.t, func() error {
		if reaction().ID.IsZero() {
			return errors.New("no reaction yet")
		}
		return nil
	})
	for what, err := range map[string]error{
		"a guest's message":  func() error { _, err := carol.Send(ctx, []byte("I too")); return err }(),
		"a guest's topic":    send(carol, content.Text("x"), func(m *content.Message) { m.Topic = []byte("x") }),
		"a guest's deletion": send(carol, content.Part{}, func(m *content.Message) { m.Replaces = welcome.ID }),
		"a guest's change of its reaction": send(carol, content.React("-1"), func(m *content.Message) {
			m.InReplyTo, m.Replaces = welcome.ID, reaction().ID
		}),
	} {
		s.works(what, err)
		discarded(what, reaction().ID)
	}
	if posts := s.in(s.alice).Posts(); len(posts) != 1 || posts[0].Deleted || len(posts[0].Reactions) != 1 {
		s.t.Errorf("alice sees %+v", posts)
	}

	s.works("a moderator gives a role", s.in(s.bob).SetRole(ctx, s.carol.User(), s.role("attendee")))
	s.has(s.carol, "attendee", s.alice, s.carol)
	_, err = carol.Send(ctx, []byte("I too"))
	s.forbidden("an attendee speaks", err)
	s.works("an attendee reports", carol.Report(ctx, s.alice.User(), Report{Messages: []Message{welcome}}))
	if list, err := node.DialAdmin(s.hub.config.Socket()).Reports(ctx); err != nil || len(list) != 1 {
		s.t.Errorf("the hub has the reports %+v, %v", list, err)
	}
	s.works("a moderator makes a speaker", s.in(s.bob).SetRole(ctx, s.carol.User(), s.role("speaker")))
	s.has(s.carol, "speaker", s.alice, s.bob, s.carol)
	s.carol.say(s.uri, "nonsense")
	within(s.t, func() error {
		if got := s.bob.texts(s.uri); len(got) == 0 || got[len(got)-1] != "carol-pc: nonsense" {
			return fmt.Errorf("bob reads %q", got)
		}
		return nil
	})
	nonsense := s.bob.last(s.uri, len(s.bob.texts(s.uri)))
	s.forbidden("a speaker deletes what another said", send(carol, content.Part{}, func(m *content.Message) { m.Replaces = welcome.ID }))
	s.forbidden("a moderator edits what another said", send(s.in(s.bob), content.Text("sense"), func(m *content.Message) { m.Replaces = nonsense.ID }))
	if err := send(s.in(s.bob), content.Part{Disposition: content.Reaction}, func(m *content.Message) { m.Replaces = nonsense.ID }); err == nil {
		s.t.Error("a message is deleted as a reaction")
	}
	s.works("a moderator deletes what another said", send(s.in(s.bob), content.Part{}, func(m *content.Message) { m.Replaces = nonsense.ID }))
	s.works("a moderator deletes a reaction", send(s.in(s.bob), content.Part{Disposition: content.Reaction}, func(m *content.Message) { m.Replaces = reaction().ID }))
	for _, d := range []*device{s.alice, s.bob} {
		within(s.t, func() error {
			posts := s.in(d).Posts()
			if len(posts) != 2 || len(posts[0].Reactions) != 0 || !posts[1].Deleted || posts[1].Data != nil {
				return fmt.Errorf("%s sees %d posts", d.ID(), len(posts))
			}
			return nil
		})
	}
	s.works("a moderator bans", s.in(s.bob).SetRole(ctx, s.carol.User(), mimi.RoleBanned))
	s.agree(s.alice, s.bob)
	s.out(s.carol)
	if _, err := s.carol.JoinByLink(ctx, link); err == nil {
		s.t.Error("who is banned joins by a link")
	}
}

// Each organisation's admins answer for its users.
func organisations(s *stage) {
	ctx := s.t.Context()
	beta, gamma := s.bob.User().Provider(), s.carol.User().Provider()
	s.create(func(hub mimi.URI) mimi.Rules { return mimi.MultiOrganizationRoom(hub, beta, gamma) })
	s.works("the creator adds an admin of beta", s.room.AddAs(ctx, s.role("beta.example admin"), s.bob.User()))
	s.works("the creator adds a user of gamma", s.room.AddAs(ctx, s.role("gamma.example user"), s.carol.User()))
	s.agree(s.alice, s.bob, s.carol)
	if _, err := s.dave.Join(ctx, s.uri); err != nil {
		s.t.Fatalf("a user of the hub's organisation joins: %v", err)
	}
	s.agree(s.alice, s.bob, s.carol, s.dave)
	s.has(s.dave, "alpha.example user", s.alice, s.bob)
	s.forbidden("beta's admin removes a user of gamma", s.in(s.bob).Remove(ctx, s.carol.User()))
	s.forbidden("beta's admin gives a user of gamma a role", s.in(s.bob).SetRole(ctx, s.carol.User(), s.role("gamma.example admin")))
	s.forbidden("beta's admin renames the room", s.names(s.in(s.bob), "beta's"))
	// An image from a client that doesn't hold to its user's role.
	image := content.Part{
		Disposition: content.Render, Cardinality: content.ExternalPart, ContentType: "image/png",
		External: &content.External{URL: "https://gamma.example/asset", Size: 9},
	}
	carol := s.in(s.carol)
	_, err := carol.SendContent(ctx, carol.Compose(image))
	s.forbidden("a user of gamma sends an image", err)
	encoded, err := carol.Compose(image).Encode()
	s.works("an image", err)
	discarded := s.discards()
	_, err = carol.send(ctx, &outgoing{content: encoded})
	s.works("an image that is sent all the same", err)
	discarded("an image of a user who may send none", content.MessageID{})
	s.works("the creator makes an admin of gamma", s.room.SetRole(ctx, s.carol.User(), s.role("gamma.example admin")))
	s.has(s.carol, "gamma.example admin", s.bob, s.carol, s.dave)
	s.forbidden("the last admin of gamma is no admin any more", s.room.SetRole(ctx, s.carol.User(), s.role("gamma.example user")))
	s.forbidden("gamma's admin removes the admin of beta", s.in(s.carol).Remove(ctx, s.bob.User()))
	s.works("the creator removes a user of its own", s.room.Remove(ctx, s.dave.User()))
	s.agree(s.alice, s.bob, s.carol)
	s.carol.say(s.uri, "three of us")
	sees(s.t, s.uri, []string{"carol-pc: three of us"}, s.alice, s.bob, s.carol)
}

func TestWhatIsNoLinkIsRefused(t *testing.T) {
	seed := strings.Repeat("A", 43)
	if l, err := ParseLink("mimi://alpha.example/r/club#" + seed); err != nil || l.Room() != "mimi://alpha.example/r/club" {
		t.Fatal(l, err)
	}
	for _, bad := range []string{
		"", "#", "mimi://alpha.example/r/club", "mimi://alpha.example/r/club#", "mimi://alpha.example/u/club#" + seed,
		"https://alpha.example/r/club#" + seed, "mimi://alpha.example/r/club#" + seed[1:], "mimi://alpha.example/r/club#" + seed + "A",
		"mimi://alpha.example/r/club#" + seed[1:] + "B", "mimi://alpha.example/r/club#" + seed + "=", "mimi://alpha.example/r/club#" + seed[1:] + "#",
	} {
		if l, err := ParseLink(bad); !errors.Is(err, ErrLink) || strings.Contains(err.Error(), seed[1:]) {
			t.Errorf("%q is read as %v, %v", bad, l, err)
		}
	}
}
