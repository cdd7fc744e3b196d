package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/parley-mls/parley/node/store"
)

// rawLimits measures what the other workloads can be held against on this machine: what a QUIC stream takes to carry a
// message of 1 KiB when writes are batched, both ends together, and how many batches of 1 KiB the store syncs.
func rawLimits(ctx context.Context, o options, r *report) error {
	cpu, rate, err := rawQUIC(ctx, o.seconds)
	if err != nil {
		return err
	}
	r.add("limits", "QUIC stream", "messages/s", rate, "/s")
	r.add("limits", "QUIC stream", "CPU of both ends per 1,000", cpu.Seconds()*1000, "s")
	for _, committers := range []int{1, 16, 128} {
		rate, err := syncs(committers, o.seconds)
		if err != nil {
			return err
		}
		r.add("limits", strconv.Itoa(committers)+" committers", "synced batches/s", rate, "/s")
	}
	return nil
}

// rawQUIC returns the processor time of both ends per message, and messages per second.
func rawQUIC(ctx context.Context, d time.Duration) (cpu time.Duration, rate float64, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return 0, 0, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"limit.example"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return 0, 0, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return 0, 0, err
	}
	roots := x509.NewCertPool()
	roots.AddCert(cert)
	protocols := []string{"limit"}
	ln, err := quic.ListenAddr("127.0.0.1:0", &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, NextProtos: protocols, MinVersion: tls.VersionTLS13,
	}, nil)
	if err != nil {
		return 0, 0, fmt.Errorf("limit of QUIC: %w", err)
	}
	defer ln.Close()
	g, gctx := errgroup.WithContext(ctx)
	var received int64
	g.Go(func() error {
		conn, err := ln.Accept(gctx)
		if err != nil {
			return err
		}
		s, err := conn.AcceptUniStream(gctx)
		if err != nil {
			return err
		}
		received, err = io.Copy(io.Discard, s)
		return err
	})
	conn, err := quic.DialAddr(ctx, ln.Addr().String(), &tls.Config{RootCAs: roots, ServerName: "limit.example", NextProtos: protocols, MinVersion: tls.VersionTLS13}, nil)
	if err != nil {
		return 0, 0, errors.Join(err, g.Wait())
	}
	defer conn.CloseWithError(0, "")
	s, err := conn.OpenUniStreamSync(ctx)
	if err != nil {
		return 0, 0, err
	}
	batch := make([]byte, 64*messageBytes)
	before, began := ownCPU(), time.Now()
	for time.Since(began) < d {
		if _, err := s.Write(batch); err != nil {
			return 0, 0, errors.Join(err, g.Wait())
		}
	}
	if err := s.Close(); err != nil {
		return 0, 0, err
	}
	if err := g.Wait(); err != nil {
		return 0, 0, err
	}
	messages := float64(received / messageBytes)
	return time.Duration(float64(ownCPU()-before) / messages), messages / time.Since(began).Seconds(), nil
}

// ownCPU is the processor time of this process.
func ownCPU() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		panic(err) // there is no such error for oneself
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// syncs returns how many batches per second so many committers get onto the disk.
func syncs(committers int, d time.Duration) (rate float64, err error) {
	dir, err := os.MkdirTemp("", "parley-loadtest-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	s, err := store.Open(dir, store.Options{})
	if err != nil {
		return 0, err
	}
	var done atomic.Int64
	var g errgroup.Group
	began := time.Now()
	for i := range committers {
		g.Go(func() error {
			value := make([]byte, 1<<10)
			for k := 0; time.Since(began) < d; k++ {
				if _, err := s.Commit(map[string][]byte{fmt.Sprintf("%d/%d", i, k): value}, nil); err != nil {
					return err
				}
				done.Add(1)
			}
			return nil
		})
	}
	err = g.Wait()
	took := time.Since(began)
	return float64(done.Load()) / took.Seconds(), errors.Join(err, s.Close())
}
