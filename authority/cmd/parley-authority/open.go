package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/node/store"
)

// The layout of a node's data directory.
func authorityDir(data string) string { return filepath.Join(data, "authority") }
func storeDir(data string) string     { return filepath.Join(data, "store") }
func socketPath(data string) string   { return filepath.Join(data, "admin.sock") }

// service is the authority of a data directory.
type service struct {
	authority.Service
	trust *authority.TrustStore // the approved peers; nil if the node runs, whose matter they are
	close func() error
}

// running says whether a node does the work.
func (s *service) running() bool { return s.trust == nil }

// pingTimeout is how long a node may take to answer.
const pingTimeout = 5 * time.Second

// openService takes the running node's service, or opens the store if none runs.
func openService(ctx context.Context, data string) (*service, error) {
	admin := authority.DialAdmin(socketPath(data))
	ping, cancel := context.WithTimeout(ctx, pingTimeout)
	err := admin.Ping(ping)
	cancel()
	switch {
	case err == nil:
		return &service{Service: admin, close: func() error { return nil }}, nil
	case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("%s: %w", socketPath(data), err)
	}
	// Without an authority, no store is made either.
	if _, err := os.Stat(filepath.Join(authorityDir(data), "authority.json")); err != nil {
		return nil, fmt.Errorf("no authority in %s: %w", data, err)
	}
	st, err := store.Open(storeDir(data), store.Options{})
	if err != nil {
		return nil, fmt.Errorf("open the store in %s: %w", data, err)
	}
	e, err := authority.Open(authorityDir(data), st, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, errors.Join(err, st.Close())
	}
	trust, err := authority.OpenTrust(st, e.Domain())
	if err != nil {
		return nil, errors.Join(err, e.Close(), st.Close())
	}
	return &service{Service: e, trust: trust, close: func() error { return errors.Join(e.Close(), st.Close()) }}, nil
}

// with runs fn with the service of a data directory.
func with(ctx context.Context, data string, fn func(*service) error) error {
	s, err := openService(ctx, data)
	if err != nil {
		return err
	}
	return errors.Join(fn(s), s.close())
}

// advise adds what to do about an error.
func advise(err error) error {
	for _, a := range []struct {
		err  error
		hint string
	}{
		{store.ErrInUse, "the node runs but its admin socket is elsewhere: give -data as in the node's configuration"},
		{fs.ErrPermission, "run this as the node's user"},
		{authority.ErrExists, "an authority is made once; choose another -data, or move the old one away"},
		{authority.ErrNotFound, "parley-authority list shows what there is"},
		{authority.ErrForeignName, "names must be of this authority's own domain"},
		{authority.ErrTokenUsed, "make another with parley-authority invite"},
		{authority.ErrUnknownProvider, "give the provider's bundle with -bundle"},
		{syscall.EADDRINUSE, "another node uses it"},
	} {
		if errors.Is(err, a.err) {
			return fmt.Errorf("%w (%s)", err, a.hint)
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		if p, ok := errors.AsType[*fs.PathError](err); ok && filepath.Base(p.Path) == "authority.json" {
			return fmt.Errorf("%w (give the right -data, or run parley-authority init)", err)
		}
	}
	return err
}

// parseName reads a user or client: a URI, or an id of the own domain.
func parseName(s string, kind byte, domain string) (mimi.URI, error) {
	if u, err := mimi.ParseURI(s); err == nil {
		if u.Kind() != kind {
			return "", usagef("%s is not a %s's name", s, kindName(kind))
		}
		return u, nil
	}
	build := mimi.UserURI
	if kind == mimi.KindClient {
		build = mimi.ClientURI
	}
	u, err := build(domain, s)
	if err != nil {
		return "", usagef("%q is not a %s's name: neither a MIMI URI nor 1 to 64 of a-z, 0-9, '.', '_', '-'", s, kindName(kind))
	}
	return u, nil
}

func kindName(kind byte) string {
	if kind == mimi.KindClient {
		return "client"
	}
	return "user"
}
