package main

import (
	"cmp"
	"context"
	"encoding/hex"
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/node/client"
)

// presets are the rules that new rooms can have, those of draft-ietf-mimi-room-policy-03, Appendix A; providers are those of
// others who take part.
var presets = map[string]func(hub mimi.URI, providers []mimi.URI) mimi.Rules{
	"cooperative":   func(hub mimi.URI, _ []mimi.URI) mimi.Rules { return mimi.CooperativeRoom(hub) },
	"strict":        func(hub mimi.URI, _ []mimi.URI) mimi.Rules { return mimi.StrictRoom(hub) },
	"moderated":     func(hub mimi.URI, _ []mimi.URI) mimi.Rules { return mimi.ModeratedRoom(hub) },
	"organisations": func(hub mimi.URI, others []mimi.URI) mimi.Rules { return mimi.MultiOrganizationRoom(hub, others...) },
}

// options parses the options before a command's arguments, of which min to max must be left; max < 0 is any number.
func options(args []string, min, max int, define func(f *flag.FlagSet)) ([]string, error) {
	f := flag.NewFlagSet("", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	define(f)
	if f.Parse(args) != nil || !(command{min: min, max: max}).takes(f.NArg()) {
		return nil, errUsage
	}
	return f.Args(), nil
}

func create(ctx context.Context, s *session, args []string) error {
	var preset string
	args, err := options(args, 1, -1, func(f *flag.FlagSet) { f.StringVar(&preset, "rules", "", "") })
	if err != nil {
		return err
	}
	var rules func(hub mimi.URI) mimi.Rules
	if preset != "" {
		make, ok := presets[preset]
		if !ok {
			return errUsage
		}
		var others []mimi.URI
		for _, domain := range args[1:] {
			p, err := mimi.ProviderURI(domain)
			if err != nil {
				return err
			}
			others = append(others, p)
		}
		rules = func(hub mimi.URI) mimi.Rules { return make(hub, others) }
	}
	if preset != "organisations" && len(args) > 1 {
		return errUsage
	}
	return s.live(ctx, func(ctx context.Context, c *client.Client) error {
		r, err := c.CreateRoomWith(ctx, args[0], rules)
		if err != nil {
			return err
		}
		fmt.Fprintln(s.out, r.URI())
		return nil
	})
}

func add(ctx context.Context, s *session, args []string) error {
	var as string
	args, err := options(args, 2, -1, func(f *flag.FlagSet) { f.StringVar(&as, "role", "", "") })
	if err != nil {
		return err
	}
	return s.inRoom(ctx, args[0], func(ctx context.Context, c *client.Client, r *client.Room) error {
		var users []mimi.URI
		for _, name := range args[1:] {
			u, err := person(ctx, c, name)
			if err != nil {
				return err
			}
			users = append(users, u)
		}
		if as == "" {
			return r.Add(ctx, users...)
		}
		index, err := roleNamed(r, as)
		if err != nil {
			return err
		}
		return r.AddAs(ctx, index, users...)
	})
}

// roleNamed returns the index of a role of the room.
func roleNamed(r *client.Room, name string) (uint32, error) {
	roles, err := r.Roles()
	if err != nil {
		return 0, err
	}
	if role := roles.Named(name); role != nil {
		return role.Index, nil
	}
	return 0, fmt.Errorf("no role %q: \"chat rules\" lists them", name)
}

// roleName is the name of one of the room's roles, for people.
func roleName(roles mimi.RoleList, index uint32) string {
	if role := roles.Find(index); role != nil && role.Name != "" {
		return printable(role.Name)
	}
	return fmt.Sprintf("role %d", index)
}

func setRole(ctx context.Context, s *session, args []string) error {
	return s.inRoom(ctx, args[0], func(ctx context.Context, c *client.Client, r *client.Room) error {
		u, err := person(ctx, c, args[1])
		if err != nil {
			return err
		}
		index, err := roleNamed(r, args[2])
		if err != nil {
			return err
		}
		return r.SetRole(ctx, u, index)
	})
}

func members(ctx context.Context, s *session, args []string) error {
	return s.inRoom(ctx, args[0], func(_ context.Context, _ *client.Client, r *client.Room) error {
		roles, err := r.Roles()
		if err != nil {
			return err
		}
		for _, p := range r.Participants() {
			fmt.Fprintf(s.out, "%s  %s%s\n", p.User, roleName(roles, p.Role), bots(p.Bots))
			for _, m := range p.Clients {
				flag := ""
				if m.Flag != "" {
					flag = "  (" + m.Flag + ")"
				}
				fmt.Fprintf(s.out, "  %s%s\n", m.Client, flag)
			}
		}
		return nil
	})
}

// bots says which bots a participant may be.
func bots(list []mimi.Bot) string {
	var names []string
	for _, b := range list {
		names = append(names, printable(b.Name))
	}
	if len(names) == 0 {
		return ""
	}
	return "  (bot: " + strings.Join(names, " or ") + ")"
}

// edit changes the room's metadata: args are the room and a text.
func (s *session) metadata(ctx context.Context, args []string, edit func(m *mimi.RoomMetadata, text string)) error {
	return s.inRoom(ctx, args[0], func(ctx context.Context, _ *client.Client, r *client.Room) error {
		return r.ChangeMetadata(ctx, func(m *mimi.RoomMetadata) { edit(m, strings.Join(args[1:], " ")) })
	})
}

func rename(ctx context.Context, s *session, args []string) error {
	return s.metadata(ctx, args, func(m *mimi.RoomMetadata, text string) { m.RoomName = text })
}

func topic(ctx context.Context, s *session, args []string) error {
	return s.metadata(ctx, args, func(m *mimi.RoomMetadata, text string) { m.Subject = text })
}

func rules(ctx context.Context, s *session, args []string) error {
	return s.inRoom(ctx, args[0], func(_ context.Context, _ *client.Client, r *client.Room) error {
		rules, err := r.Rules()
		if err != nil {
			return err
		}
		s.printRules(&rules)
		return nil
	})
}

func (s *session) printRules(rules *mimi.Rules) {
	for _, role := range rules.Roles {
		may := "may do nothing"
		if len(role.Capabilities) > 0 {
			may = strings.Trim(fmt.Sprint(role.Capabilities), "[]")
		}
		fmt.Fprintf(s.out, "%s (%d): %s\n", roleName(rules.Roles, role.Index), role.Index, may)
		for _, c := range role.Changes {
			var to []string
			for _, index := range c.To {
				to = append(to, roleName(rules.Roles, index))
			}
			fmt.Fprintf(s.out, "  makes of %s: %s\n", roleName(rules.Roles, c.From), strings.Join(to, ", "))
		}
	}
	for _, p := range rules.Preauthorized {
		var claims []string
		for _, c := range p.Claims {
			claims = append(claims, printable(string(c.Value)))
		}
		fmt.Fprintf(s.out, "%s: by itself %s\n", strings.Join(claims, " and "), roleName(rules.Roles, p.Role))
	}
	if p := rules.Base; p != nil {
		fmt.Fprintf(s.out, "membership: fixed %v, several devices %v, %s users, %s devices\n", p.FixedMembership, p.MultiDevice, most(p.MaxUsers), most(p.MaxClients))
	}
	if p := rules.JoinLinks; p != nil {
		fmt.Fprintf(s.out, "links: for several people %v, one at a time %v, for %s\n", p.MultiUser, p.OnRequest, seconds(p.Expiration))
	}
	if p := rules.Assets; p != nil {
		fmt.Fprintf(s.out, "files: images up to %d bytes, sounds %d, videos %d, others %d\n", p.MaxImage, p.MaxAudio, p.MaxVideo, p.MaxAttachment)
	}
	if p := rules.History; p != nil {
		fmt.Fprintf(s.out, "history: sharing is %s, up to %s\n", optionality(p.Sharing), seconds(p.MaxPeriod))
	}
	if p := rules.Expiration; p != nil {
		fmt.Fprintf(s.out, "messages: expiring is %s, after %d to %d s\n", optionality(p.Expiring), p.Min, p.Max)
	}
	for _, b := range rules.Bots {
		fmt.Fprintf(s.out, "bot: %s, %s\n", printable(b.Name), roleName(rules.Roles, b.Role))
	}
	if rules.RenewalDays > 0 {
		fmt.Fprintf(s.out, "devices renew their keys within %d days\n", rules.RenewalDays)
	}
}

func most(n *uint32) string {
	if n == nil {
		return "any number of"
	}
	return fmt.Sprint("at most ", *n)
}

func seconds(n uint32) string {
	if n == 0 {
		return "any time"
	}
	return (time.Duration(n) * time.Second).String()
}

func optionality(o mimi.Optionality) string {
	return []string{"allowed", "required", "forbidden"}[min(o, mimi.Forbidden)]
}

func link(ctx context.Context, s *session, args []string) error {
	var o client.LinkOptions
	var as string
	args, err := options(args, 1, 1, func(f *flag.FlagSet) {
		f.StringVar(&as, "role", "", "")
		f.BoolVar(&o.Once, "once", false, "")
		f.DurationVar(&o.Lifetime, "for", 0, "")
	})
	if err != nil {
		return err
	}
	return s.inRoom(ctx, args[0], func(ctx context.Context, _ *client.Client, r *client.Room) error {
		if as != "" {
			var err error
			if o.Role, err = roleNamed(r, as); err != nil {
				return err
			}
		}
		l, err := r.CreateLink(ctx, o)
		if err != nil {
			return err
		}
		fmt.Fprintln(s.out, l.URL())
		return nil
	})
}

func links(ctx context.Context, s *session, args []string) error {
	return s.inRoom(ctx, args[0], func(_ context.Context, _ *client.Client, r *client.Room) error {
		list, err := r.Links()
		roles, bad := r.Roles()
		if err := cmp.Or(err, bad); err != nil {
			return err
		}
		for _, l := range list {
			uses, until := "once", ""
			if l.MultiUser {
				uses = "for many"
			}
			if l.Expires != 0 {
				until = ", until " + time.Unix(int64(l.Expires), 0).Local().Format("2006-01-02 15:04")
			}
			fmt.Fprintf(s.out, "%x  %s, %s%s\n", l.Key[:4], roleName(roles, l.Role), uses, until)
		}
		return nil
	})
}

func unlink(ctx context.Context, s *session, args []string) error {
	return s.inRoom(ctx, args[0], func(ctx context.Context, _ *client.Client, r *client.Room) error {
		list, err := r.Links()
		if err != nil {
			return err
		}
		list = slices.DeleteFunc(list, func(l mimi.JoinLink) bool { return !strings.HasPrefix(hex.EncodeToString(l.Key), args[1]) })
		if len(list) != 1 {
			return fmt.Errorf("%d links begin with %q: \"chat links\" lists them", len(list), args[1])
		}
		return r.RevokeLink(ctx, list[0].Key)
	})
}

func join(ctx context.Context, s *session, args []string) error {
	if strings.Contains(args[0], "#") {
		l, err := client.ParseLink(args[0])
		if err != nil {
			return err
		}
		return s.live(ctx, func(ctx context.Context, c *client.Client) error {
			_, err := c.JoinByLink(ctx, l)
			return err
		})
	}
	return s.live(ctx, func(ctx context.Context, c *client.Client) error {
		uri, err := mimi.ParseURI(args[0])
		if err != nil {
			rooms, err := c.Joinable(ctx)
			if err != nil {
				return err
			}
			for _, r := range rooms {
				if strings.HasPrefix(r.ID(), args[0]) {
					uri = r
				}
			}
			if uri == "" {
				return fmt.Errorf("no room %q to join: \"chat rooms\" lists them", args[0])
			}
		}
		_, err = c.Join(ctx, uri)
		return err
	})
}
