package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/parley-mls/parley/node"
)

// roomsPerUser is in how many rooms a member of the workload scale is: as many as it has KeyPackages.
const roomsPerUser = 100

// scale has many rooms of three, one member of each organisation, and many registered clients of alpha of whom a few are
// connected. It measures what that costs while nothing happens, and how long the nodes take to start with it.
func scale(ctx context.Context, o options, r *report) error {
	n, err := startNetwork(ctx, o.tcp)
	if err != nil {
		return err
	}
	defer n.close()
	name := fmt.Sprintf("%d rooms", o.rooms)
	if err := n.manyRooms(ctx, o.rooms); err != nil {
		return err
	}
	began := time.Now()
	connected, err := n.register(ctx, o.registered, o.connected)
	if err != nil {
		return err
	}
	defer func() {
		for _, d := range connected {
			d.close()
		}
	}()
	r.add("scale", name, "registrations/s", float64(o.registered)/time.Since(began).Seconds(), "/s")
	fmt.Fprintf(o.verbose, "scale: %d rooms, %d registered, %d connected\n", o.rooms, o.registered, o.connected)

	var rest time.Duration
	for _, org := range n.orgs {
		org.Terminate()
		began := time.Now()
		if err := org.Start(ctx); err != nil {
			return err
		}
		rest = max(rest, time.Since(began))
	}
	r.add("scale", name, "longest start of a node", rest.Seconds(), "s")
	for _, org := range n.orgs {
		if err := org.WaitPeers(ctx, len(n.orgs)-1, 30*time.Second); err != nil {
			return err
		}
	}
	following, stop := context.WithCancel(ctx)
	defer stop()
	g, gctx := errgroup.WithContext(following)
	for _, d := range connected {
		if err := d.authenticate(gctx); err != nil {
			return err
		}
		wait, err := d.follow(gctx, false, ignore)
		if err != nil {
			return err
		}
		g.Go(wait)
	}
	before, err := n.used()
	bytes, err2 := loopbackBytes()
	if err := errors.Join(err, err2); err != nil {
		return err
	}
	began = time.Now()
	select {
	case <-time.After(o.seconds):
	case <-gctx.Done():
		return g.Wait()
	}
	took := time.Since(began).Seconds()
	after, err := n.used()
	bytes2, err2 := loopbackBytes()
	if err := errors.Join(err, err2); err != nil {
		return err
	}
	stop()
	if err := g.Wait(); err != nil {
		return err
	}
	r.add("scale", name, "idle CPU of the nodes", (after.cpu-before.cpu).Seconds()/took*100, "%")
	r.add("scale", name, "idle traffic, all of the loopback", float64(bytes2-bytes)/took/1000, "kB/s")
	r.memory("scale", name, after)
	return nil
}

// manyRooms makes rooms with one member of each organisation.
func (n *network) manyRooms(ctx context.Context, rooms int) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(2)
	for first := 0; first < rooms; first += roomsPerUser {
		g.Go(func() error {
			members, err := n.devices(gctx, fmt.Sprintf("member-%d", first), 1)
			if err != nil {
				return err
			}
			for _, d := range members {
				defer d.close()
			}
			for _, d := range members[1:] {
				list, err := d.keyPackages(roomsPerUser - 1) // one it has
				if err != nil {
					return err
				}
				if err := d.publish(gctx, list); err != nil {
					return err
				}
			}
			for i := first; i < min(rooms, first+roomsPerUser); i++ {
				if _, err := members[0].createRoom(gctx, "room-"+strconv.Itoa(i), members[1:]); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// register enrols clients of alpha; the first of them stay connected.
func (n *network) register(ctx context.Context, clients, connected int) ([]*device, error) {
	t := newTrust(n.tcp)
	list := make([]*device, connected)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(enrolling)
	for i := range clients {
		g.Go(func() error {
			d, err := enrol(gctx, n.orgs[0], "client-"+strconv.Itoa(i), t)
			if err != nil {
				return err
			}
			if i < connected {
				list[i] = d
			} else {
				d.close()
			}
			return nil
		})
	}
	return list, g.Wait()
}

// away measures how fast a client and a peer get what came while they were away: messages of one room, and of a hundred (fewer for few messages).
func away(ctx context.Context, o options, r *report) error {
	n, err := startNetwork(ctx, o.tcp)
	if err != nil {
		return err
	}
	defer n.close()
	rm, err := n.newRoom(ctx, "away", 1)
	if err != nil {
		return err
	}
	defer rm.close()
	if err := rm.fill(ctx, o.away); err != nil {
		return err
	}
	name := fmt.Sprintf("%d messages", o.away)
	for org, who := range []string{"a client of the hub", "a client of a follower"} {
		began := time.Now()
		got, err := rm.ofOrg(org, 0).count(ctx, rm, o.away)
		if err != nil {
			return err
		}
		r.add("away", name, who+": messages/s", float64(got)/time.Since(began).Seconds(), "/s")
	}

	rooms := min(100, max(1, o.away/10))
	list := make([]*room, rooms)
	for i := range list {
		if list[i], err = n.newRoom(ctx, "away-"+strconv.Itoa(i), 1); err != nil {
			return err
		}
		defer list[i].close()
	}
	gamma := n.orgs[2]
	gamma.Terminate()
	var g errgroup.Group
	g.SetLimit(8)
	perRoom := max(1, o.away/rooms)
	for _, rm := range list {
		g.Go(func() error { return rm.fill(ctx, perRoom) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if err := gamma.Start(ctx); err != nil {
		return err
	}
	began := time.Now()
	if err := n.drained(ctx, gamma.Domain); err != nil {
		return err
	}
	took := time.Since(began)
	total := 0
	for _, rm := range list {
		reader := rm.ofOrg(2, 0)
		if err := reader.authenticate(ctx); err != nil {
			return err
		}
		got, err := reader.count(ctx, rm, perRoom)
		if err != nil {
			return err
		}
		total += got
	}
	r.add("away", fmt.Sprintf("%d rooms", rooms), "a peer: messages/s", float64(total)/took.Seconds(), "/s")
	return nil
}

// fill sends messages from the room's creator, several at a time.
func (rm *room) fill(ctx context.Context, messages int) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(64)
	for range messages {
		req, err := rm.members[0].seal(rm.uri, make([]byte, messageBytes))
		if err != nil {
			return err
		}
		g.Go(func() error {
			_, err := rm.members[0].submit(gctx, req)
			return err
		})
	}
	return g.Wait()
}

// drained waits until alpha has nothing more for a peer.
func (n *network) drained(ctx context.Context, domain string) error {
	admin := node.DialAdmin(n.orgs[0].Socket())
	for {
		peers, err := admin.Peers(ctx)
		if err != nil {
			return err
		}
		for _, p := range peers {
			if p.Domain == domain && p.Waiting == 0 {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// loopbackBytes is what the loopback interface has carried (proc(5): /proc/net/dev).
func loopbackBytes() (int64, error) {
	b, err := os.ReadFile("/proc/net/dev")
	if err != nil {
		return 0, fmt.Errorf("traffic: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(line), "lo:"); ok {
			return strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
		}
	}
	return 0, errors.New("traffic: /proc/net/dev has no loopback")
}
