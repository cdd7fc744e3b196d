package client

import (
	"sync"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/federation/mimi/content"
)

// Event is what a program learns from its client as it happens: Message, MemberAdded, MemberRemoved, Committed, Joined,
// Removed, Discarded, Frozen, HubFault, HubRestored, Gap, Expired, HistoryOffered, TrustChanged or ConsentChanged. What it
// tells is durable, but for Typing and Receipt.
type Event interface{ event() }

// Message is an application message of a room.
type Message struct {
	Room   mimi.URI
	Seq    uint64    // number in the room's log
	User   mimi.URI  // of the sender
	Client mimi.URI  // of the sender
	Time   time.Time // when the hub accepted it, by the hub's clock
	// Data is the message itself: in a room of MIMI content what a body of one part has, or what there is to read of
	// others.
	Data    []byte
	Content *content.Message  // nil in a room whose messages are bytes
	ID      content.MessageID // of Content
	Flag    string            // what was wrong with the sender's credential, see Member
	// Frank is the hub's stamp, verified, with which the message can be reported. Where the room has franking and it is
	// nil, FrankFault says why.
	Frank      *mimi.Frank
	FrankFault string
	// GivenBy is the other device of this user that gave the message to this one, see Room.TakeHistory; "" for those that
	// this client received itself. Of such a message the group has verified nothing: who has sent it, when, and what, that
	// device says.
	GivenBy mimi.URI

	form        uint8
	application []byte // as it was encrypted
	moderates   bool   // it deletes, and the sender may delete what others have sent
}

// MemberAdded says that a client became a member of a room.
type MemberAdded struct {
	Room         mimi.URI
	Epoch        uint64
	User, Client mimi.URI
	External     bool // it joined by itself, as a further device of a participant
}

// MemberRemoved says that a client isn't a member of a room any more.
type MemberRemoved struct {
	Room         mimi.URI
	Epoch        uint64
	User, Client mimi.URI
}

// Committed says that a commit has begun an epoch of a room, and whose it is. Those that are in the epoch agree on the
// room's state only if they have the same Authenticator (RFC 9420, Section 8.7).
type Committed struct {
	Room          mimi.URI
	Seq           uint64 // number of the commit in the room's log
	Epoch         uint64
	User, Client  mimi.URI
	Authenticator []byte
}

// Joined says that this client is a member of a room now.
type Joined struct{ Room mimi.URI }

// Removed says that this client isn't a member of a room any more.
type Removed struct{ Room mimi.URI }

// Discarded is a message that isn't shown, or a proposal of the hub to remove Client that this client doesn't commit. Client
// is empty if it isn't known.
type Discarded struct {
	Room   mimi.URI
	Seq    uint64
	Client mimi.URI
	Reason string
}

// Frozen says that the hub ordered something in a room that this client can't accept.
type Frozen struct {
	Room mimi.URI
	Seq  uint64
	Err  error
}

// HubFault says that a room's hub contradicts itself, or that a node on the way to this client has changed what the hub
// has ordered: what people see of the room may differ from one to the other. Nothing is held up by it.
type HubFault struct {
	Room     mimi.URI
	Seq      uint64   // number of the entry up to which something was signed that isn't what came here
	Client   mimi.URI // whose message shows it, empty if the node's own words do
	Reason   string
	Evidence []byte // a file that proves it to anybody, see Client.Evidence; nil if there is no proof of it
}

// HubRestored says that the node that hosts a room goes on from an older copy of its store.
type HubRestored struct {
	Room mimi.URI
	Seq  uint64
	Lost bool // entries that this client has aren't in the room's log any more, or are others
}

// Gap says that this client has entered a room anew, by an external commit: it was so far behind that the room's log begins
// later, or the log has lost entries, or the client's own state was an old copy. What was said between the entries After
// and Next can't be read here.
type Gap struct {
	Room  mimi.URI
	After uint64 // the last entry that was processed before
	Next  uint64 // the first that comes now; not beyond After if the hub gives numbers again
}

// Expired says that a message has expired, and was deleted with what was shown with it.
type Expired struct {
	Room mimi.URI
	Seq  uint64
}

// HistoryOffered says that another device of this user, Client, lets this one have what was said in a room before this one
// was there. Room.TakeHistory takes it.
type HistoryOffered struct{ Room, Client mimi.URI }

// TrustChanged says that the trust bundle of a provider changed: revocations, for example.
type TrustChanged struct{ Domain string }

// ConsentChanged says that a request for consent came or was taken back, or what was decided. One without request and
// decision is gone.
type ConsentChanged struct{ Consent }

func (Message) event()        {}
func (MemberAdded) event()    {}
func (MemberRemoved) event()  {}
func (Committed) event()      {}
func (Joined) event()         {}
func (Removed) event()        {}
func (Discarded) event()      {}
func (Frozen) event()         {}
func (HubFault) event()       {}
func (HubRestored) event()    {}
func (Gap) event()            {}
func (Expired) event()        {}
func (HistoryOffered) event() {}
func (TrustChanged) event()   {}
func (ConsentChanged) event() {}

// maxBacklog is how many events a reader may be behind.
const maxBacklog = 1 << 16

// Events returns a channel that gets every event from now on; each call makes one more. A reader that falls more than
// 65,536 events behind is given up: its channel is closed, as all are by Close.
func (c *Client) Events() <-chan Event { return c.events.subscribe() }

// broadcast hands every event to every reader, and waits for none.
type broadcast struct {
	mu      sync.Mutex
	readers map[*reader]bool // guarded by mu
	closed  bool             // guarded by mu
	pumps   sync.WaitGroup
}

type reader struct {
	backlog []Event       // guarded by broadcast.mu
	more    chan struct{} // has room for one; filled after the backlog grew
	done    chan struct{}
	out     chan Event
}

func (b *broadcast) subscribe() <-chan Event {
	r := &reader{more: make(chan struct{}, 1), done: make(chan struct{}), out: make(chan Event, 64)}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		close(r.out)
		return r.out
	}
	if b.readers == nil {
		b.readers = make(map[*reader]bool)
	}
	b.readers[r] = true
	b.pumps.Go(func() { b.pump(r) })
	return r.out
}

func (b *broadcast) pump(r *reader) {
	defer close(r.out)
	for {
		b.mu.Lock()
		events := r.backlog
		r.backlog = nil
		b.mu.Unlock()
		for _, e := range events {
			select {
			case r.out <- e:
			case <-r.done:
				return
			}
		}
		select {
		case <-r.more:
		case <-r.done:
			return
		}
	}
}

func (b *broadcast) send(events []Event) {
	if len(events) == 0 {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for r := range b.readers {
		if len(r.backlog)+len(events) > maxBacklog {
			b.drop(r)
			continue
		}
		r.backlog = append(r.backlog, events...)
		select {
		case r.more <- struct{}{}:
		default:
		}
	}
}

// drop gives a reader up. b.mu is held.
func (b *broadcast) drop(r *reader) {
	delete(b.readers, r)
	close(r.done)
}

func (b *broadcast) close() {
	b.mu.Lock()
	b.closed = true
	for r := range b.readers {
		b.drop(r)
	}
	b.mu.Unlock()
	b.pumps.Wait()
}
