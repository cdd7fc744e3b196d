package mls

import (
	"errors"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

var (
	textPlain = MediaType{Type: "text/plain", Parameters: []MediaParameter{{"charset", "UTF-8"}}}
	png       = MediaType{Type: "image/png"}
)

func TestMediaTypesAreTheSame(t *testing.T) {
	for _, c := range []struct {
		a, b MediaType
		same bool
	}{
		{png, MediaType{Type: "IMAGE/PNG"}, true},
		{textPlain, MediaType{"Text/Plain", []MediaParameter{{"Charset", "UTF-8"}}}, true},
		{textPlain, MediaType{"text/plain", []MediaParameter{{"charset", "utf-8"}}}, false},
		{textPlain, MediaType{Type: "text/plain"}, false},
		{textPlain, png, false},
	} {
		if c.a.Equal(c.b) != c.same || c.b.Equal(c.a) != c.same {
			t.Errorf("%v and %v are the same: %v", c.a, c.b, !c.same)
		}
	}
}

func TestMediaTypesAreAskedForAndFramed(t *testing.T) {
	list := func(l ...MediaType) Extensions {
		return Extensions{{ExtensionAppDataDictionary, codec.Marshal(AppDataDictionary(nil).Set(ComponentMediaTypes, codec.Marshal(MediaTypeList(l))))}}
	}
	refused := func(what string, err error) {
		t.Helper()
		var ve *ValidationError
		if !errors.As(err, &ve) || ve.Section != sectionMediaTypes {
			t.Errorf("%s: got %v, want a violation of %s", what, err, sectionMediaTypes)
		}
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	alice := &client{name: "alice", signer: newSigner(t, testSuite), store: newMemStore()}
	o := GroupOptions{GroupID: []byte("group"), Suite: testSuite, Credential: BasicCredential([]byte("alice")), Signer: alice.signer,
		Extensions: list(textPlain, png)}
	refused("creator", second(NewGroup(testConfig(), nil, o)))
	o.LeafExtensions = list(png, textPlain, MediaType{Type: "text/html"})
	var err error
	alice.Group, err = NewGroup(testConfig(), alice.store, o)
	must(err)
	if got := alice.MediaTypes(); len(got) != 2 || !got[0].Equal(textPlain) {
		t.Errorf("media types %v", got)
	}

	lacking := KeyPackageOptions{Suite: testSuite, Credential: BasicCredential([]byte("bob")), Signer: newSigner(t, testSuite), LeafExtensions: list(png)}
	kp, _, err := NewKeyPackage(lacking)
	must(err)
	refused("committer", second(alice.Commit(nil, CommitOptions{Proposals: []Proposal{add(kp)}})))
	refused("proposer", second(alice.Propose(nil, nil, add(kp))))
	refused("committer who asks for more", second(alice.Commit(nil, CommitOptions{Proposals: []Proposal{setTerms(ComponentMediaTypes, MediaTypeList{{Type: "video/mp4"}})}})))
	gi, err := alice.GroupInfo(true, true)
	must(err)
	join := ExternalJoinOptions{GroupInfo: gi, Credential: lacking.Credential, Signer: lacking.Signer, LeafExtensions: lacking.LeafExtensions}
	refused("joiner", second(ExternalJoin(testConfig(), join)))

	full := lacking
	full.LeafExtensions = list(textPlain, png)
	kp, secrets, err := NewKeyPackage(full)
	must(err)
	c, err := alice.Commit(alice.store, CommitOptions{Proposals: []Proposal{add(kp)}, TreeInWelcome: true})
	must(err)
	must(alice.Confirm(alice.store))
	bob := &client{name: "bob", signer: full.Signer, store: newMemStore()}
	bob.Group, err = JoinGroup(testConfig(), bob.store, bob.signer, c.Welcome(), kp, secrets, nil)
	must(err)

	refused("sender", second(alice.Encrypt(alice.store, nil, []byte("text"))))
	for _, a := range []ApplicationFraming{{MediaType: png, Content: []byte("x")}, {Content: []byte("hello")}} {
		m, err := alice.Encrypt(alice.store, nil, codec.Marshal(a))
		must(err)
		got, err := bob.Receive(bob.store, m)
		must(err)
		want := a.MediaType
		if want.Type == "" {
			want = textPlain
		}
		if f := got.(*ApplicationMessage).Framing; f == nil || !f.MediaType.Equal(want) || string(f.Content) != string(a.Content) {
			t.Errorf("%v received as %v", a, f)
		}
	}
	f := &forgery{TB: t, alice: alice}
	m := f.encrypt(alice, f.sign(alice, FramedContent{Sender: Sender{Type: SenderMember}, ContentType: ContentApplication, ApplicationData: []byte("text")}))
	before := dump(bob.Group)
	refused("receiver", second(bob.Receive(bob.store, m)))
	sameState(t, "bob", dump(bob.Group), before)

	// Another member may know more of a client than it says of itself.
	kp, _, err = NewKeyPackage(KeyPackageOptions{Suite: testSuite, Credential: BasicCredential([]byte("carol")), Signer: newSigner(t, testSuite)})
	must(err)
	got, err := bob.Receive(bob.store, f.commit(forged{props: []Proposal{add(kp)}}))
	must(err)
	must(bob.Apply(bob.store, got.(*StagedCommit)))
	must(second(bob.Commit(bob.store, CommitOptions{})))
}

func TestMediaTypesOfLeavesAreWellFormed(t *testing.T) {
	group := &terms{mediaTypes: MediaTypeList{{Type: "text/plain"}}}
	l := &LeafNode{Extensions: Extensions{{ExtensionAppDataDictionary, codec.Marshal(AppDataDictionary(nil).Set(ComponentMediaTypes, []byte{9}))}}}
	if err := group.checkMediaTypes(l); !section(err, sectionMediaTypes) || !errors.Is(err, codec.ErrTruncated) {
		t.Errorf("got %v, want a violation of %s for its length", err, sectionMediaTypes)
	}
}
