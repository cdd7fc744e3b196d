package mls

import (
	"bytes"
	"crypto/ed25519"
	"encoding"
	"encoding/base64"
	"encoding/gob"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"log/slog"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// secretsIn returns all key material that a value refers to: what has a secret's type, and keys that sign.
func secretsIn(v any) map[string][]byte {
	found := make(map[string][]byte)
	eachSecret(v, func(path string, b []byte) {
		if len(b) >= 16 {
			found[path] = b
		}
	})
	return found
}

// eachSecret calls f with all key material, itself and not a copy, and with the way to it.
func eachSecret(v any, f func(path string, b []byte)) {
	seen := make(map[uintptr]bool)
	var walk func(path string, v reflect.Value)
	walk = func(path string, v reflect.Value) {
		switch v.Kind() {
		case reflect.Pointer:
			if v.IsNil() || seen[v.Pointer()] {
				return
			}
			seen[v.Pointer()] = true
			walk(path, v.Elem())
		case reflect.Interface:
			if !v.IsNil() {
				walk(path, v.Elem())
			}
		case reflect.Struct:
			for i := range v.NumField() {
				walk(path+"."+v.Type().Field(i).Name, v.Field(i))
			}
		case reflect.Map:
			for it := v.MapRange(); it.Next(); {
				walk(fmt.Sprintf("%s[%v]", path, it.Key()), it.Value())
			}
		case reflect.Slice:
			switch v.Type() {
			case reflect.TypeFor[secret](), reflect.TypeFor[HPKEPrivateKey](), reflect.TypeFor[ed25519.PrivateKey]():
				f(path, v.Bytes())
				return
			}
			if v.Type().Elem().Kind() != reflect.Uint8 {
				for i := range v.Len() {
					walk(fmt.Sprintf("%s[%d]", path, i), v.Index(i))
				}
			}
		}
	}
	walk("", reflect.ValueOf(v))
}

func init() { gob.Register(ed25519.PrivateKey{}) }

// shown is a value in every form in which a program could write it down.
func shown(v any) string {
	var b bytes.Buffer
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "% x", "%d", "%o", "%b", "%c", "%U", "%t"} {
		fmt.Fprintf(&b, verb+"\n", v)
		fmt.Fprintf(&b, verb+"\n", []any{v})
		fmt.Fprintf(&b, verb+"\n", struct{ V any }{v})
	}
	if s, ok := v.(fmt.Stringer); ok {
		b.WriteString(s.String())
	}
	if s, ok := v.(fmt.GoStringer); ok {
		b.WriteString(s.GoString())
	}
	for _, x := range []any{v, []any{v}, struct{ V any }{v}} {
		j, _ := json.Marshal(x)
		b.Write(j)
		slog.New(slog.NewTextHandler(&b, nil)).Info("x", "v", x, slog.Group("g", "v", x))
		slog.New(slog.NewJSONHandler(&b, nil)).Info("x", "v", x, slog.Group("g", "v", x))
		_ = xml.NewEncoder(&b).Encode(x)
		_ = gob.NewEncoder(&b).Encode(x)
	}
	if m, ok := v.(encoding.TextMarshaler); ok {
		text, _ := m.MarshalText()
		b.Write(text)
	}
	return b.String()
}

// forms are the ways to write the beginning of a secret.
func forms(secret []byte) []string {
	s := secret[:15] // a multiple of three, for base64
	return []string{
		string(s), hex.EncodeToString(s), strings.ToUpper(hex.EncodeToString(s)), strings.Trim(fmt.Sprintf("% x", s), " "),
		base64.StdEncoding.EncodeToString(s), base64.URLEncoding.EncodeToString(s),
		strings.Trim(fmt.Sprint(s), "[]"), strings.ReplaceAll(strings.Trim(fmt.Sprint(s), "[]"), " ", ","),
		strings.Trim(strings.TrimPrefix(fmt.Sprintf("%#v", s), "[]byte"), "{}"), strings.Trim(fmt.Sprintf("%o", s), "[]"),
		strings.Trim(fmt.Sprintf("%b", s), "[]"), strings.Trim(fmt.Sprintf("%q", string(s)), `"`), strings.Trim(fmt.Sprintf("%U", s), "[]"),
	}
}

// hides checks that a text has none of the secrets.
func hides(t *testing.T, what, text string, secrets map[string][]byte) {
	t.Helper()
	if len(secrets) == 0 {
		t.Errorf("%s has no secret to look for", what)
	}
	for where, s := range secrets {
		for i, form := range forms(s) {
			if strings.Contains(text, form) {
				t.Errorf("%s shows its secret %s in form %d", what, where, i)
			}
		}
	}
}

// secretSamples has values of all exported types that hold secrets.
func secretSamples(t *testing.T) (*forgery, []any) {
	t.Helper()
	f := newForgery(t)
	gi, err := f.alice.GroupInfo(true, true)
	f.must(err)
	signer := newSigner(t, testSuite)
	joining := ExternalJoinOptions{GroupInfo: gi, Credential: BasicCredential([]byte("eve")), Signer: signer}
	join, err := ExternalJoin(testConfig(), joining)
	f.must(err)
	f.room.propose(f.carol.ProposeUpdate(f.carol.store, UpdateOptions{}))
	_, kp, secrets := keyPackage(t, testSuite, "new")
	c, err := f.alice.Commit(nil, CommitOptions{Proposals: []Proposal{add(kp)}})
	f.must(err)
	got, err := f.bob.Receive(nil, c.Message())
	f.must(err)
	own, err := f.alice.Receive(nil, c.Message())
	f.must(err)
	gs, err := c.Welcome().decryptSecrets(kp.Ref(), secrets.InitKey)
	f.must(err)
	return f, []any{
		f.alice.Group, f.bob.Group, c, own, got, join, secrets, *secrets, gs, *gs,
		GroupOptions{Signer: signer}, &KeyPackageOptions{Signer: signer}, CommitOptions{Signer: signer}, joining,
		UpdateOptions{Signer: signer}, LinkOptions{Signer: signer}, ResyncOptions{Signer: signer},
		secrets.InitKey, f.alice.secrets.init,
		f.carol.state.pending, f.bob.messages, f.bob.past, header{secrets: f.alice.secrets}, // not exported
	}
}

func TestSecretsAreNotShown(t *testing.T) {
	_, samples := secretSamples(t)
	for _, v := range samples {
		what := fmt.Sprintf("%T", v)
		hides(t, what, shown(v), secretsIn(v))
		if gob.NewEncoder(io.Discard).Encode(v) == nil {
			t.Errorf("gob encodes %s", what)
		}
		if p := reflect.ValueOf(v); p.Kind() == reflect.Pointer { // the struct itself
			hides(t, what[1:], shown(p.Elem().Interface()), secretsIn(v))
		}
	}
}

// TestServersHaveNoSecrets looks through all that a PublicGroup refers to.
func TestServersHaveNoSecrets(t *testing.T) {
	f, _ := secretSamples(t)
	m, err := f.alice.Propose(f.alice.store, nil, remove(1))
	f.must(err)
	proposal, err := f.server.CheckProposal(m.Public)
	f.must(err)
	commit, err := f.server.CheckCommit(f.alice.PendingCommit().Message().Public)
	f.must(err)
	for _, v := range []any{f.server, proposal, commit, f.store.m} {
		for where := range secretsIn(v) {
			t.Errorf("%T has a secret at %s", v, where)
		}
	}
}

// TestErrorsShowNoSecrets collects what goes wrong with damaged messages and states.
func TestErrorsShowNoSecrets(t *testing.T) {
	f, samples := secretSamples(t)
	var failures []error
	fails := func(err error) {
		t.Helper()
		if err == nil {
			t.Error("nothing failed")
		}
		failures = append(failures, err)
	}
	m, err := f.alice.Commit(nil, CommitOptions{})
	fails(err)
	if m != nil {
		t.Fatal("a second commit is staged")
	}
	_, err = f.dave.Encrypt(nil, nil, nil) // there is a proposal pending
	fails(err)
	for i := range 2 {
		c := *f.alice.PendingCommit().Message().Public
		if c.Signature = bytes.Clone(c.Signature); i == 0 {
			c.Signature[0] ^= 1
		} else {
			c.ConfirmationTag = make([]byte, len(c.ConfirmationTag))
		}
		_, err = f.bob.Receive(nil, NewMLSMessage(&c))
		fails(err)
	}
	for k, v := range f.bob.store.m {
		damaged := f.bob.store.clone()
		damaged.m[k] = v[:len(v)/2]
		if _, err := LoadGroup(testConfig(), f.bob.signer, damaged.all()); err != nil {
			failures = append(failures, err)
		}
	}
	_, err = f.alice.Export("label", nil, 1<<20)
	fails(err)
	fails(f.alice.CheckAuthenticator(f.alice.Epoch(), []byte("other")))
	_, err = testSuite.hpkeSeal(bytes.NewReader(make([]byte, 64)), HPKEPublicKey("short"), hpkeInfo{}, f.alice.secrets.init)
	fails(err)
	all := errors.Join(failures...)
	for _, v := range samples {
		hides(t, fmt.Sprintf("%d errors", len(failures)), shown(all)+all.Error(), secretsIn(v))
	}
}

// TestTypesWithSecretsAreRedacted finds the exported types from which a secret or a signer can be reached, in the
// source, and wants each to hide what it has and to be among the samples.
func TestTypesWithSecretsAreRedacted(t *testing.T) {
	_, samples := secretSamples(t)
	sampled := make(map[string]bool)
	for _, v := range samples {
		sampled[strings.TrimPrefix(strings.TrimPrefix(fmt.Sprintf("%T", v), "*"), "mls.")] = true
	}
	types := make(map[string]ast.Expr)
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			if s, ok := n.(*ast.TypeSpec); ok {
				types[s.Name.Name] = s.Type
			}
			return true
		})
	}
	holds := map[string]bool{"secret": true, "HPKEPrivateKey": true, "Signer": true}
	again := true
	var mark func(name string, in ast.Node)
	mark = func(name string, in ast.Node) {
		ast.Inspect(in, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncType:
				return false
			case *ast.Field: // its type and not its name
				mark(name, n.Type)
				return false
			case *ast.Ident:
				if holds[n.Name] && !holds[name] {
					holds[name], again = true, true
				}
			}
			return true
		})
	}
	for again {
		again = false
		for name, typ := range types {
			mark(name, typ)
		}
	}
	free := []string{ // has the type, and never a secret: see TestServersHaveNoSecrets
		"PublicGroup", "StagedProposal", "StagedPublic"}
	for name := range types {
		if ast.IsExported(name) && holds[name] && !sampled[name] && !slices.Contains(free, name) {
			t.Errorf("%s may hold secrets, and no test shows that it hides them", name)
		}
	}
}
