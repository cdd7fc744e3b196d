package federation

import (
	"context"
	"fmt"
	"net/http"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls/codec"
)

// LogPath, followed by a room, is where a node that was restored from a backup asks for entries of the room's log that it
// has lost (POST): as the room's hub those who follow the room, else the hub. MIMI has nothing of the kind.
const LogPath = "/parley/v1/log/"

// KnownPath is where a node says what it knows of the asking peer (GET): a node that was restored from a backup learns there
// what it has published since, and the one that was superseded that it was.
const KnownPath = "/parley/v1/known"

const (
	maxLogRequest = MaxHead + 1<<10
	maxLogPage    = MaxNotify
	maxKnown      = MaxHead + MaxBundle + 16

	// MaxLogEntries is the largest number of entries in a LogPage.
	MaxLogEntries = 1024
)

// LogRequest asks for the entries after a number. The head is one that the room's hub has signed; it shows a hub that the
// peer has had what comes before, and a follower which incarnation of the hub asks.
//
//	struct {
//	    uint64 after;
//	    opaque head<V>;
//	} LogRequest;
type LogRequest struct {
	After uint64
	Head  []byte // at most MaxHead bytes
}

// MarshalMLS implements codec.Marshaler.
func (q LogRequest) MarshalMLS(w *codec.Writer) {
	w.Uint64(q.After)
	w.Opaque(q.Head)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (q *LogRequest) UnmarshalMLS(r *codec.Reader) { *q = LogRequest{r.Uint64(), r.OpaqueMax(MaxHead)} }

// LogPage answers a LogRequest with the entries that come next, at most MaxLogEntries, without a gap; none if there are no
// more. The head is that of a request to notify with these entries if the hub answers, and the signed head of its whole log
// if there are none; else it is the last one that the hub has signed for the follower, which reaches beyond them.
//
//	struct {
//	    opaque head<V>;
//	    LogEntry entries<V>;
//	} LogPage;
type LogPage struct {
	Head    []byte // at most MaxHead bytes
	Entries []LogEntry
}

// LogEntry is one entry of a log.
//
//	struct {
//	    uint64 seq;
//	    opaque fanout<V>;
//	    uint8 context[32];
//	} LogEntry;
type LogEntry struct {
	Seq     uint64
	Fanout  []byte   // a mimi.FanoutMessage
	Context [32]byte // SHA-256 of the GroupContext that the entry leads to
}

// MarshalMLS implements codec.Marshaler.
func (p LogPage) MarshalMLS(w *codec.Writer) {
	w.Opaque(p.Head)
	codec.WriteVector(w, p.Entries, func(w *codec.Writer, e LogEntry) {
		w.Uint64(e.Seq)
		w.Opaque(e.Fanout)
		w.Raw(e.Context[:])
	})
}

// UnmarshalMLS implements codec.Unmarshaler.
func (p *LogPage) UnmarshalMLS(r *codec.Reader) {
	p.Head = r.OpaqueMax(MaxHead)
	p.Entries = codec.ReadVector(r, func(r *codec.Reader) (e LogEntry) {
		e.Seq, e.Fanout = r.Uint64(), r.Opaque()
		copy(e.Context[:], r.Raw(len(e.Context)))
		return e
	})
	if len(p.Entries) > MaxLogEntries {
		r.Failf("%d entries in a page", len(p.Entries))
	}
}

// Known is what a node knows of a peer.
//
//	struct {
//	    uint64 incarnation;
//	    opaque head<V>;
//	    opaque bundle<V>;
//	} Known;
type Known struct {
	// Incarnation is that of the node which answers. It isn't signed: one that was restored may have lost entries, and is
	// asked for them.
	Incarnation uint64
	Head        []byte // the first head of the last incarnation, at most MaxHead bytes; empty if there is none
	Bundle      []byte // the last trust bundle, JSON of at most MaxBundle bytes; empty if there is none
}

// MarshalMLS implements codec.Marshaler.
func (k Known) MarshalMLS(w *codec.Writer) {
	w.Uint64(k.Incarnation)
	w.Opaque(k.Head)
	w.Opaque(k.Bundle)
}

// UnmarshalMLS implements codec.Unmarshaler.
func (k *Known) UnmarshalMLS(r *codec.Reader) {
	*k = Known{r.Uint64(), r.OpaqueMax(MaxHead), r.OpaqueMax(MaxBundle)}
}

func (c *call) log() (*answer, error) {
	room, err := mimi.ParseURI(c.param)
	if err != nil || room.Kind() != mimi.KindRoom {
		return nil, refusal(CodeMalformed, "the path names no room")
	}
	if room.Domain() != c.h.domain && room.Domain() != c.from {
		return nil, refusal(CodeNotAllowed, "neither %s nor %s is the hub of %s", c.h.domain, c.from, room)
	}
	return c.body(maxLogRequest, contentType, func(body []byte) (*answer, error) {
		var req LogRequest
		if err := decode(body, &req); err != nil {
			return nil, err
		}
		page, err := c.h.provider.Log(c.r.Context(), c.from, room, &req)
		if err != nil {
			return nil, err
		}
		return encoded(page, 0), nil
	})
}

func (c *call) known() (*answer, error) {
	known, err := c.h.provider.Known(c.from)
	if err != nil {
		return nil, err
	}
	return encoded(known, 0), nil
}

// Log asks a peer for entries of a room's log. What is after the number that was asked for, and in order, is the caller's
// to check.
func (c *Client) Log(ctx context.Context, peer string, room mimi.URI, req *LogRequest) (*LogPage, error) {
	escaped, err := mimi.Expand("https://"+peer+LogPath+"{room}", string(room))
	if err != nil {
		return nil, fmt.Errorf("federation: log of %s: %w", room, err)
	}
	body, _, err := c.do(ctx, peer, exchange{
		method: http.MethodPost, url: escaped, contentType: contentType, body: codec.Marshal(req), want: http.StatusOK, max: maxLogPage,
	})
	if err != nil {
		return nil, err
	}
	page := new(LogPage)
	return page, decodeAnswer(peer, body, page)
}

// Known asks a peer what it knows of this provider.
func (c *Client) Known(ctx context.Context, peer string) (*Known, error) {
	body, _, err := c.do(ctx, peer, exchange{method: http.MethodGet, url: "https://" + peer + KnownPath, want: http.StatusOK, max: maxKnown})
	if err != nil {
		return nil, err
	}
	known := new(Known)
	return known, decodeAnswer(peer, body, known)
}
