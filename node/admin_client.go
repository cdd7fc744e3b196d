package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"

	"github.com/parley-mls/parley/authority"
)

// Admin speaks to a running node through its admin socket.
type Admin struct {
	client http.Client
	socket string
}

// ErrNoNode says that no node answers on the admin socket.
var ErrNoNode = errors.New("no node answers")

// DialAdmin returns an Admin for the socket; see Config.Socket. Nothing is dialled before the first call.
func DialAdmin(socket string) *Admin {
	return &Admin{socket: socket, client: http.Client{
		Timeout: adminTimeout,
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", socket)
			},
			DisableKeepAlives: true,
		},
	}}
}

// Status returns how the node is doing. Like every method, it fails with ErrNoNode if no node answers.
func (a *Admin) Status(ctx context.Context) (*Status, error) {
	s := new(Status)
	if err := a.call(ctx, http.MethodGet, adminStatus, nil, s); err != nil {
		return nil, err
	}
	return s, nil
}

// Peers returns the approved peers, and nodes that gossip has introduced and nobody has approved.
func (a *Admin) Peers(ctx context.Context) ([]PeerStatus, error) {
	var list []PeerStatus
	err := a.call(ctx, http.MethodGet, adminPeers, nil, &list)
	return list, err
}

// Rooms returns the rooms that the node hosts.
func (a *Admin) Rooms(ctx context.Context) ([]RoomStatus, error) {
	var list []RoomStatus
	err := a.call(ctx, http.MethodGet, adminRooms, nil, &list)
	return list, err
}

// Reports returns the reports of abuse in rooms that the node hosts, oldest first.
func (a *Admin) Reports(ctx context.Context) ([]Report, error) {
	var list []Report
	err := a.call(ctx, http.MethodGet, adminReports, nil, &list)
	return list, err
}

// RemoveReport deletes a report by its ID, of which the beginning is enough.
func (a *Admin) RemoveReport(ctx context.Context, id string) error {
	return a.call(ctx, http.MethodPost, adminDismiss, dismissRequest{id}, nil)
}

// Evidence returns what the node has against hubs that have signed two histories of a room.
func (a *Admin) Evidence(ctx context.Context) ([]EvidenceStatus, error) {
	var list []EvidenceStatus
	err := a.call(ctx, http.MethodGet, adminEvidence, nil, &list)
	return list, err
}

// Backup has the node write a backup to a directory, an absolute path, that doesn't exist yet. Only ctx bounds how long
// that takes.
func (a *Admin) Backup(ctx context.Context, dir string) (*Backup, error) {
	patient := &Admin{socket: a.socket, client: http.Client{Transport: a.client.Transport}}
	b := new(Backup)
	if err := patient.call(ctx, http.MethodPost, adminBackup, backupRequest{dir}, b); err != nil {
		return nil, err
	}
	return b, nil
}

// ApprovePeer approves a provider by the fingerprint of its root. The address may be empty if gossip will know it.
func (a *Admin) ApprovePeer(ctx context.Context, domain string, f authority.Fingerprint, address string) error {
	return a.call(ctx, http.MethodPost, adminApprove, approveRequest{domain, f, address}, nil)
}

// RemovePeer takes an approval back.
func (a *Admin) RemovePeer(ctx context.Context, domain string) error {
	return a.call(ctx, http.MethodPost, adminRemove, approveRequest{Domain: domain}, nil)
}

// Metrics returns the node's metrics in Prometheus's text format.
func (a *Admin) Metrics(ctx context.Context) (string, error) {
	var text string
	err := a.call(ctx, http.MethodGet, "/metrics", nil, &text)
	return text, err
}

func (a *Admin) call(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://node"+path, body)
	if err != nil {
		return err
	}
	resp, err := a.client.Do(req)
	if err != nil {
		return fmt.Errorf("%w on %s: %w", ErrNoNode, a.socket, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	if err != nil {
		return fmt.Errorf("reading the node's answer: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		var e adminError
		if json.Unmarshal(b, &e) != nil || e.Error == "" {
			return fmt.Errorf("the node answers %s", resp.Status)
		}
		return errors.New(e.Error)
	}
	switch out := out.(type) {
	case nil:
		return nil
	case *string:
		*out = string(b)
		return nil
	default:
		if err := json.Unmarshal(b, out); err != nil {
			return fmt.Errorf("reading the node's answer: %w", err)
		}
		return nil
	}
}
