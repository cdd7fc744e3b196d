package mls

import (
	"bytes"
	"crypto"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

// readingMethods are the exported methods that change nothing, as calls: those without a Batch, except for named ones.
// Arguments are zero values.
func readingMethods(g any, change ...string) map[string]func() []reflect.Value {
	calls := make(map[string]func() []reflect.Value)
	v := reflect.ValueOf(g)
	for i := range v.NumMethod() {
		name, f := v.Type().Method(i).Name, v.Method(i)
		args := make([]reflect.Value, f.Type().NumIn())
		reads := !slices.Contains(change, name) && name != "Format"
		for j := range args {
			reads = reads && f.Type().In(j) != reflect.TypeFor[Batch]()
			args[j] = reflect.Zero(f.Type().In(j))
		}
		if reads {
			calls[name] = func() []reflect.Value { return f.Call(args) }
		}
	}
	return calls
}

// changingMethods are the methods without a Batch that change a group, or take turns with those that do.
var (
	changingMethods       = []string{"AddSigner", "Disregard", "SafeDecrypt"}
	publicChangingMethods = []string{"CheckCommit", "CheckProposal", "CheckSemiPrivateCommit", "CheckSemiPrivateProposal"}
)

// gate is where a change stops until the test lets it go on.
type gate struct {
	armed            bool
	entered, release chan struct{}
}

func newGate() *gate {
	return &gate{armed: true, entered: make(chan struct{}), release: make(chan struct{})}
}

// pass stops the first one who comes.
func (g *gate) pass() {
	if g.armed {
		g.armed = false
		close(g.entered)
		<-g.release
	}
}

type gateVerifier struct {
	testVerifier
	*gate
}

func (v gateVerifier) VerifyCredential(c Credential, key []byte, cs CipherSuite) error {
	v.pass()
	return v.testVerifier.VerifyCredential(c, key, cs)
}

type gateBatch struct{ *gate }

func (b gateBatch) Set(_, _ []byte) { b.pass() }
func (b gateBatch) Delete([]byte)   { b.pass() }

type gateSigner struct {
	crypto.Signer
	*gate
}

func (s gateSigner) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	s.pass()
	return s.Signer.Sign(rand, digest, opts)
}

type gateComponent struct {
	appendComponent
	*gate
}

func (c gateComponent) Update(current []byte, updates [][]byte) ([]byte, error) {
	c.pass()
	return c.appendComponent.Update(current, updates)
}

// TestReadersDoNotWaitForAChange stops each kind of change in its middle and calls all methods that read.
func TestReadersDoNotWaitForAChange(t *testing.T) {
	tests := map[string]func(f *forgery, at *gate) (*Group, func() error){
		"receive, at the verifier": func(f *forgery, at *gate) (*Group, func() error) {
			_, kp, _ := keyPackage(t, testSuite, "new")
			c, err := f.alice.Commit(nil, CommitOptions{Proposals: []Proposal{add(kp)}})
			f.must(err)
			f.bob.cfg.Verifier = gateVerifier{gate: at}
			return f.bob.Group, func() error { _, err := f.bob.Receive(nil, c.Message()); return err }
		},
		"receive, at the policy": func(f *forgery, at *gate) (*Group, func() error) {
			c, err := f.alice.Commit(nil, CommitOptions{})
			f.must(err)
			f.bob.cfg.Policy = func(*StagedInfo) error { at.pass(); return nil }
			return f.bob.Group, func() error { _, err := f.bob.Receive(nil, c.Message()); return err }
		},
		"receive, at the pre-shared key": func(f *forgery, at *gate) (*Group, func() error) {
			c, err := f.alice.Commit(nil, CommitOptions{Proposals: []Proposal{sharedPSK()}})
			f.must(err)
			psk := f.bob.cfg.PSK
			f.bob.cfg.PSK = func(id PreSharedKeyID) ([]byte, error) { at.pass(); return psk(id) }
			return f.bob.Group, func() error { _, err := f.bob.Receive(nil, c.Message()); return err }
		},
		"apply, at the batch": func(f *forgery, at *gate) (*Group, func() error) {
			c, err := f.alice.Commit(nil, CommitOptions{})
			f.must(err)
			got, err := f.bob.Receive(nil, c.Message())
			f.must(err)
			return f.bob.Group, func() error { return f.bob.Apply(gateBatch{at}, got.(*StagedCommit)) }
		},
		"commit, at the component": func(f *forgery, at *gate) (*Group, func() error) {
			f.alice.cfg.Components = map[ComponentID]Component{0x8001: gateComponent{gate: at}}
			return f.alice.Group, func() error {
				_, err := f.alice.Commit(nil, CommitOptions{Proposals: []Proposal{appData(0x8001, "x")}})
				return err
			}
		},
		"confirm, at the batch": func(f *forgery, at *gate) (*Group, func() error) {
			f.must(second(f.alice.Commit(nil, CommitOptions{})))
			return f.alice.Group, func() error { return f.alice.Confirm(gateBatch{at}) }
		},
		"propose, at the signer": func(f *forgery, at *gate) (*Group, func() error) {
			f.must(f.alice.AddSigner(gateSigner{f.alice.signer, at}))
			return f.alice.Group, func() error { _, err := f.alice.Propose(nil, nil, remove(1)); return err }
		},
		"encrypt, at the batch": func(f *forgery, at *gate) (*Group, func() error) {
			return f.alice.Group, func() error { _, err := f.alice.Encrypt(gateBatch{at}, nil, nil); return err }
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			f := newForgery(t)
			at := newGate()
			g, change := test(f, at)
			epoch, pending := g.Epoch(), len(g.Pending())
			done := make(chan error)
			go func() { done <- change() }()
			<-at.entered
			if name == "propose, at the signer" {
				at.armed = false // the gate's signer signs GroupInfos too
			}
			for _, call := range readingMethods(g, changingMethods...) {
				call()
			}
			if g.Epoch() != epoch || len(g.Pending()) != pending || g.PendingCommit() != nil && name != "confirm, at the batch" {
				t.Error("an unfinished change shows")
			}
			close(at.release)
			f.must(<-done)
		})
	}
}

// TestReadersDoNotWaitForAServersChange is the same for a PublicGroup.
func TestReadersDoNotWaitForAServersChange(t *testing.T) {
	f := newForgery(t)
	at := newGate()
	c, err := f.alice.Commit(nil, CommitOptions{})
	f.must(err)
	server := newServer(t, f.alice.Group)
	server.rules.policy = func(*StagedInfo) error { at.pass(); return nil }
	type result struct {
		s   *StagedPublic
		err error
	}
	done := make(chan result)
	go func() {
		s, err := server.CheckCommit(c.Message().Public)
		done <- result{s, err}
	}()
	<-at.entered
	read := func() {
		for _, call := range readingMethods(server, publicChangingMethods...) {
			call()
		}
	}
	read()
	close(at.release)
	r := <-done
	f.must(r.err)

	at = newGate()
	applied := make(chan error)
	go func() { applied <- server.Apply(gateBatch{at}, r.s, c.GroupInfo()) }()
	<-at.entered
	read()
	if server.Epoch() != f.alice.Epoch() {
		t.Error("an unfinished change shows")
	}
	close(at.release)
	f.must(<-applied)
	if server.Epoch() != f.alice.Epoch()+1 {
		t.Error("the change isn't there")
	}
}

func newServer(t *testing.T, g *Group) *PublicGroup {
	t.Helper()
	gi, err := g.GroupInfo(true, true)
	if err != nil {
		t.Fatal(err)
	}
	server, err := NewPublicGroup(PublicConfig{Verifier: g.cfg.Verifier, Components: testComponents}, nil, gi, nil)
	if err != nil {
		t.Fatal(err)
	}
	return server
}

// TestReadersSeeWholeEpochs reads all the time while commits and messages are processed. The race detector watches.
func TestReadersSeeWholeEpochs(t *testing.T) {
	group := benchGroupOf(t, benchKind{64, fullTree, false, 0})
	alice, bob := group.member(t, 0), group.member(t, 32)
	server := newServer(t, alice)
	stop := make(chan struct{})
	var readers sync.WaitGroup
	reader := func(read func() error) {
		readers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := read(); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for _, g := range []*Group{alice, bob} {
		reader(func() error {
			gi, err := g.GroupInfo(true, true)
			if err != nil {
				return err
			}
			return wholeInfo(gi)
		})
		reader(func() error {
			for _, call := range readingMethods(g, changingMethods...) {
				call()
			}
			for range g.Members() {
			}
			return nil
		})
	}
	reader(func() error {
		for _, call := range readingMethods(server, publicChangingMethods...) {
			call()
		}
		return wholeInfo(server.GroupInfo())
	})
	err := func() error {
		store := newMemStore()
		for i := range 12 {
			c, err := alice.Commit(store, CommitOptions{})
			if err != nil {
				return err
			}
			s, err := server.CheckCommit(c.Message().Public)
			if err != nil {
				return err
			}
			gi := *c.GroupInfo()
			gi.Extensions = gi.Extensions.Set(ExtensionRatchetTree, codec.Marshal(c.Tree()))
			if err := server.Apply(store, s, &gi); err != nil {
				return err
			}
			got, err := bob.Receive(store, c.Message())
			if err != nil {
				return err
			}
			if err := bob.Apply(store, got.(*StagedCommit)); err != nil {
				return err
			}
			if err := alice.Confirm(store); err != nil {
				return err
			}
			m, err := bob.Encrypt(store, nil, []byte{byte(i)})
			if err != nil {
				return err
			}
			if _, err := alice.Receive(store, m); err != nil {
				return err
			}
		}
		return nil
	}()
	close(stop)
	readers.Wait()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(alice.EpochAuthenticator(), bob.EpochAuthenticator()) || server.Epoch() != alice.Epoch() {
		t.Error("they differ in the end")
	}
}

// wholeInfo says whether the parts of a GroupInfo are of one epoch; its signature is not looked at, since a server's
// was changed.
func wholeInfo(gi *GroupInfo) error {
	tree, err := gi.RatchetTree()
	if err != nil || tree == nil {
		return fmt.Errorf("no tree: %w", err)
	}
	if !bytes.Equal(tree.Hash(testSuite), gi.GroupContext.TreeHash) {
		return fmt.Errorf("epoch %d: tree of another epoch", gi.GroupContext.Epoch)
	}
	return nil
}

// TestChangesTakeTurns sends from several goroutines into one unguarded store: all keys differ, and what is stored is
// the state after the last one.
func TestChangesTakeTurns(t *testing.T) {
	f := newForgery(t)
	var wg sync.WaitGroup
	messages := make(chan *MLSMessage, 8*25)
	for range 8 {
		wg.Go(func() {
			for range 25 {
				m, err := f.alice.Encrypt(f.alice.store, nil, []byte("hello"))
				if err != nil {
					t.Error(err)
					return
				}
				messages <- m
			}
		})
	}
	wg.Wait()
	close(messages)
	generations := make(map[uint32]bool)
	for m := range messages {
		got, err := f.bob.Receive(nil, m)
		f.must(err)
		generations[got.(*ApplicationMessage).Generation] = true
	}
	if len(generations) != 8*25 {
		t.Errorf("%d generations", len(generations))
	}
	sameState(t, "alice", f.alice.store.m, dump(f.alice.Group))
}

// TestMethodsLock looks in the source of the exported methods for the lock that those hold which change a group, and for
// fields that the others may not touch.
func TestMethodsLock(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	var guarded []string
	for _, g := range []reflect.Type{reflect.TypeFor[Group](), reflect.TypeFor[PublicGroup]()} {
		for i := range g.NumField() {
			if f := g.Field(i).Name; !slices.Contains([]string{"op", "mu", "view", "cfg"}, f) {
				guarded = append(guarded, f)
			}
		}
	}
	found := 0
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range file.Decls {
			f, ok := d.(*ast.FuncDecl)
			if !ok || f.Recv == nil || !f.Name.IsExported() {
				continue
			}
			recv, change := printed(f.Recv.List[0].Type), slices.Contains(changingMethods, f.Name.Name)
			if recv == "*PublicGroup" {
				change = slices.Contains(publicChangingMethods, f.Name.Name)
			} else if recv != "*Group" {
				continue
			}
			for _, p := range f.Type.Params.List {
				change = change || printed(p.Type) == "Batch"
			}
			found++
			locks := 0
			ast.Inspect(f.Body, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.CallExpr:
					if fun := printed(n.Fun); fun == "g.op.Lock" || fun == "g.done" {
						locks++
					}
				case *ast.SelectorExpr:
					if field, ok := strings.CutPrefix(printed(n), "g."); ok && !change && slices.Contains(guarded, field) {
						t.Errorf("%s: %s.%s reads %s, which is only for who holds g.op", name, recv, f.Name.Name, field)
					}
				}
				return true
			})
			if change && locks != 2 {
				t.Errorf("%s: %s.%s doesn't begin with g.op.Lock() and defer g.done()", name, recv, f.Name.Name)
			}
		}
	}
	if found < 40 {
		t.Errorf("%d methods found", found)
	}
}

// printed returns the source of a name, a selector or a pointer to one.
func printed(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.Ident:
		return e.Name
	case *ast.StarExpr:
		return "*" + printed(e.X)
	case *ast.SelectorExpr:
		return printed(e.X) + "." + e.Sel.Name
	}
	return ""
}
