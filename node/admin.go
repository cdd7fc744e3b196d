package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"slices"
	"time"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation/mimi"
)

// The admin socket: JSON over HTTP on a unix socket of mode 0600. Whoever can open it is the operator. The authority's
// methods are mounted beside the node's own, and metrics for Prometheus are under /metrics.
const (
	adminStatus  = "/node/status"
	adminPeers   = "/node/peers"
	adminApprove = "/node/peers/approve"
	adminRemove  = "/node/peers/remove"
	adminRooms   = "/node/rooms"
	adminReports = "/node/reports"
	adminDismiss = "/node/reports/remove"

	adminEvidence = "/node/evidence"
	adminBackup   = "/node/backup"

	maxAdminBody = 64 << 10
	adminTimeout = 30 * time.Second
)

// Status is how a node is doing.
type Status struct {
	Domain      string                `json:"domain"`
	Address     string                `json:"address"`
	Version     string                `json:"version"`
	Fingerprint authority.Fingerprint `json:"fingerprint"`
	Rooms       int                   `json:"rooms"`     // hosted here
	Streams     int                   `json:"streams"`   // of clients, open
	Peers       int                   `json:"peers"`     // approved
	Alive       int                   `json:"alive"`     // of them, as gossip has it
	Waiting     int                   `json:"waiting"`   // items for peers in the outbox
	DiskFree    uint64                `json:"disk_free"` // bytes on the data directory's disk
	ReadOnly    bool                  `json:"read_only"` // the disk is nearly full: nothing new is taken
	Restoring   bool                  `json:"restoring"` // nobody is served before peers have said what came after the backup
}

// RoomStatus is what the node knows of a room that it hosts.
type RoomStatus struct {
	Room         mimi.URI            `json:"room"`
	Epoch        uint64              `json:"epoch"`
	Last         uint64              `json:"last"` // the number of the log's last entry
	Suite        string              `json:"suite"`
	Participants []ParticipantStatus `json:"participants"`
	Clients      []mimi.URI          `json:"clients"`
	Removals     []mimi.URI          `json:"removals,omitempty"` // clients whose removal is pending
}

// ParticipantStatus is a user of a room.
type ParticipantStatus struct {
	User mimi.URI `json:"user"`
	Role uint32   `json:"role"` // as mimi.RoleMember and so on
}

type approveRequest struct {
	Domain      string                `json:"domain"`
	Fingerprint authority.Fingerprint `json:"fingerprint"`
	Address     string                `json:"address,omitempty"`
}

type dismissRequest struct {
	ID string `json:"id"`
}

type backupRequest struct {
	Dir string `json:"dir"` // absolute
}

type adminError struct {
	Code  string `json:"code"`
	Error string `json:"error"`
}

// listenAdmin makes the admin socket. One that a crash left behind is replaced: the store's lock says that no other
// node uses this directory.
func listenAdmin(path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("replacing the admin socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("making the admin socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("making the admin socket: %w", err), l.Close())
	}
	return l, nil
}

func (n *Node) adminHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/authority/", authority.AdminHandler(n.service))
	mux.Handle("GET /metrics", n.metrics.handler())
	mux.HandleFunc("GET "+adminStatus, func(w http.ResponseWriter, _ *http.Request) { n.reply(w, n.status) })
	mux.HandleFunc("GET "+adminPeers, func(w http.ResponseWriter, _ *http.Request) {
		n.reply(w, func() (any, error) { return slices.Concat([]PeerStatus{}, n.peers()), nil })
	})
	mux.HandleFunc("GET "+adminRooms, func(w http.ResponseWriter, _ *http.Request) { n.reply(w, n.roomStatuses) })
	mux.HandleFunc("POST "+adminApprove, func(w http.ResponseWriter, r *http.Request) {
		n.reply(w, func() (any, error) {
			req, err := readAdmin[approveRequest](w, r)
			if err != nil {
				return nil, err
			}
			return struct{}{}, n.approve(r.Context(), req.Domain, req.Fingerprint, req.Address)
		})
	})
	mux.HandleFunc("POST "+adminRemove, func(w http.ResponseWriter, r *http.Request) {
		n.reply(w, func() (any, error) {
			req, err := readAdmin[approveRequest](w, r)
			if err != nil {
				return nil, err
			}
			return struct{}{}, n.removePeer(req.Domain)
		})
	})
	mux.HandleFunc("GET "+adminReports, func(w http.ResponseWriter, _ *http.Request) {
		n.reply(w, func() (any, error) { return n.listReports() })
	})
	mux.HandleFunc("GET "+adminEvidence, func(w http.ResponseWriter, _ *http.Request) {
		n.reply(w, func() (any, error) { return n.listEvidence() })
	})
	mux.HandleFunc("POST "+adminBackup, func(w http.ResponseWriter, r *http.Request) {
		n.reply(w, func() (any, error) {
			req, err := readAdmin[backupRequest](w, r)
			if err != nil {
				return nil, err
			}
			return n.backup(req.Dir)
		})
	})
	mux.HandleFunc("POST "+adminDismiss, func(w http.ResponseWriter, r *http.Request) {
		n.reply(w, func() (any, error) {
			req, err := readAdmin[dismissRequest](w, r)
			if err != nil {
				return nil, err
			}
			return struct{}{}, n.removeReport(req.ID)
		})
	})
	return mux
}

func readAdmin[T any](w http.ResponseWriter, r *http.Request) (T, error) {
	var req T
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxAdminBody))
	d.DisallowUnknownFields()
	if err := d.Decode(&req); err != nil {
		return req, refuse("malformed", "%v", err)
	}
	return req, nil
}

// reply answers a request of the admin socket in JSON.
func (n *Node) reply(w http.ResponseWriter, f func() (any, error)) {
	v, err := f()
	status := http.StatusOK
	if err != nil {
		r := reason(err)
		if r == nil {
			n.log.Error("admin request failed", "err", err)
			r = &refusal{code: "internal", detail: err.Error()} // the operator may read it
		}
		v, status = adminError{r.code, r.detail}, statuses[r.code].http
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(v); err != nil {
		n.log.Debug("admin answer", "err", err)
	}
}

func (n *Node) status() (any, error) {
	uris, err := n.hostedRooms()
	if err != nil {
		return nil, err
	}
	s := &Status{
		Domain: n.cfg.Domain, Address: n.cfg.Advertise, Version: Version(), Fingerprint: n.embedded.Root(),
		Rooms: len(uris), Streams: n.listeners.count(), DiskFree: n.disk.last.Load(), ReadOnly: n.disk.full.Load(),
		Restoring: n.restored.Load(),
	}
	for _, p := range n.peers() {
		if !p.Approved {
			continue
		}
		s.Peers++
		s.Waiting += p.Waiting
		if p.Alive {
			s.Alive++
		}
	}
	return s, nil
}

func (n *Node) roomStatuses() (any, error) {
	uris, err := n.hostedRooms()
	if err != nil {
		return nil, err
	}
	list := []RoomStatus{}
	for _, uri := range uris {
		r, err := n.hostedRoom(uri)
		if err != nil {
			return nil, err
		}
		s, err := n.roomStatus(r)
		if err != nil {
			return nil, err
		}
		list = append(list, s)
	}
	return list, nil
}

func (n *Node) roomStatus(r *room) (RoomStatus, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	who, err := r.who()
	if err != nil {
		return RoomStatus{}, err
	}
	s := RoomStatus{Room: r.uri, Epoch: r.group.Epoch(), Last: r.record.last, Suite: r.group.Suite().String()}
	for _, p := range who.list {
		s.Participants = append(s.Participants, ParticipantStatus(p))
	}
	for m := range r.group.Members() {
		if _, client, err := n.verifier.IdentityOf(m.Leaf.Credential); err == nil {
			s.Clients = append(s.Clients, client)
		}
	}
	for _, p := range r.group.Pending() {
		if p.Proposal.Remove == nil {
			continue
		}
		if m, ok := r.group.Member(p.Proposal.Remove.Removed); ok {
			if _, client, err := n.verifier.IdentityOf(m.Leaf.Credential); err == nil {
				s.Removals = append(s.Removals, client)
			}
		}
	}
	return s, nil
}
