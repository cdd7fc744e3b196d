package node

import (
	"maps"
	"slices"
	"sync"

	"github.com/parley-mls/parley/federation/mimi"
)

// listeners are the open event streams. Whoever made something durable tells them; they read it from the store.
type listeners struct {
	mu       sync.Mutex
	byClient map[mimi.URI]map[*listener]struct{} // guarded by mu
	byUser   map[mimi.URI]map[*listener]struct{} // guarded by mu
	byRoom   map[mimi.URI]map[*listener]struct{} // guarded by mu
	over     error                               // guarded by mu: why there are no more streams, nil while there are
}

func newListeners() *listeners {
	return &listeners{
		byClient: make(map[mimi.URI]map[*listener]struct{}), byUser: make(map[mimi.URI]map[*listener]struct{}),
		byRoom: make(map[mimi.URI]map[*listener]struct{}),
	}
}

// listener collects what is new for one stream. wake has a value whenever something was collected since take.
type listener struct {
	client mimi.URI
	user   mimi.URI
	wake   chan struct{}

	mu    sync.Mutex
	news  news                  // guarded by mu
	rooms map[mimi.URI]struct{} // guarded by listeners.mu; where it is in byRoom
}

// news is what may be new for a stream.
type news struct {
	rooms     map[mimi.URI]bool // true: the client's membership may have changed
	welcomes  bool
	trust     map[string]struct{}
	consents  map[string]string // prefixes, by the keys of records
	claimed   bool              // few KeyPackages are left
	ephemeral []ephemeral
	ended     error // the stream must end with this
}

// add registers a stream of a user's client, or returns nil if it has max of them.
func (ls *listeners) add(client, user mimi.URI, max int) *listener {
	l := &listener{client: client, user: user, wake: make(chan struct{}, 1), rooms: make(map[mimi.URI]struct{})}
	ls.mu.Lock()
	defer ls.mu.Unlock()
	if ls.over != nil {
		l.tell(func(n *news) { n.ended = ls.over })
	}
	if len(ls.byClient[client]) >= max {
		return nil
	}
	insert(ls.byClient, client, l)
	insert(ls.byUser, user, l)
	return l
}

func (ls *listeners) remove(l *listener) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	take(ls.byClient, l.client, l)
	take(ls.byUser, l.user, l)
	for r := range l.rooms {
		take(ls.byRoom, r, l)
	}
}

// connected says whether a client has an open stream.
func (ls *listeners) connected(client mimi.URI) bool {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	return len(ls.byClient[client]) > 0
}

// listen has l hear of a room.
func (ls *listeners) listen(l *listener, room mimi.URI) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	l.rooms[room] = struct{}{}
	insert(ls.byRoom, room, l)
}

// joined has all streams of a client hear of a room, and look at it.
func (ls *listeners) joined(client, room mimi.URI) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	for l := range ls.byClient[client] {
		l.rooms[room] = struct{}{}
		insert(ls.byRoom, room, l)
		l.tell(func(n *news) { n.addRoom(room, true) })
	}
}

// member has all streams of a client look at its membership of a room anew before they send anything more of it.
func (ls *listeners) member(client, room mimi.URI) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	for l := range ls.byClient[client] {
		l.tell(func(n *news) { n.addRoom(room, true) })
	}
}

// room says that a room's log has grown.
func (ls *listeners) room(room mimi.URI) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	for l := range ls.byRoom[room] {
		l.tell(func(n *news) { n.addRoom(room, false) })
	}
}

// welcome says that a client has a new Welcome.
func (ls *listeners) welcome(client mimi.URI) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	for l := range ls.byClient[client] {
		l.tell(func(n *news) { n.welcomes = true })
	}
}

// consent says that records of a user's consents have changed.
func (ls *listeners) consent(user mimi.URI, keys map[string]string) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	for l := range ls.byUser[user] {
		l.tell(func(n *news) {
			if n.consents == nil {
				n.consents = make(map[string]string)
			}
			maps.Copy(n.consents, keys)
		})
	}
}

// keyPackages says that few KeyPackages of a client are left.
func (ls *listeners) keyPackages(client mimi.URI) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	for l := range ls.byClient[client] {
		l.tell(func(n *news) { n.claimed = true })
	}
}

// trust says that a provider's bundle has changed.
func (ls *listeners) trust(domain string) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	for _, set := range ls.byClient {
		for l := range set {
			l.tell(func(n *news) {
				if n.trust == nil {
					n.trust = make(map[string]struct{})
				}
				n.trust[domain] = struct{}{}
			})
		}
	}
}

// end ends all streams of a client with err, or everybody's if client is empty, those that are yet to begin too.
func (ls *listeners) end(client mimi.URI, err error) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	if client == "" {
		ls.over = err
	}
	for c, set := range ls.byClient {
		if client == "" || c == client {
			for l := range set {
				l.tell(func(n *news) { n.ended = err })
			}
		}
	}
}

// look has all streams of a client see whether they may go on.
func (ls *listeners) look(client mimi.URI) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	for l := range ls.byClient[client] {
		l.tell(func(*news) {})
	}
}

// count returns the number of open streams.
func (ls *listeners) count() int {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	n := 0
	for _, set := range ls.byClient {
		n += len(set)
	}
	return n
}

func (l *listener) tell(fn func(*news)) {
	l.mu.Lock()
	fn(&l.news)
	l.mu.Unlock()
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// take returns what was collected and begins anew. The end of a stream stays.
func (l *listener) take() news {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := l.news
	l.news = news{ended: n.ended}
	return n
}

func (n *news) addRoom(room mimi.URI, membership bool) {
	if n.rooms == nil {
		n.rooms = make(map[mimi.URI]bool)
	}
	n.rooms[room] = n.rooms[room] || membership
}

// sortedRooms returns the rooms in a stable order.
func (n *news) sortedRooms() []mimi.URI { return slices.Sorted(maps.Keys(n.rooms)) }

func insert(m map[mimi.URI]map[*listener]struct{}, k mimi.URI, l *listener) {
	if m[k] == nil {
		m[k] = make(map[*listener]struct{})
	}
	m[k][l] = struct{}{}
}

func take(m map[mimi.URI]map[*listener]struct{}, k mimi.URI, l *listener) {
	delete(m[k], l)
	if len(m[k]) == 0 {
		delete(m, k)
	}
}

// endedWith returns what the stream must end with, nil if it may go on.
func (l *listener) endedWith() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.news.ended
}
