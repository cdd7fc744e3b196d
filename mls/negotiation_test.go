package mls

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/parley-mls/parley/mls/codec"
)

func reserved(id ComponentID) bool { return id&0x0f0f == 0x0a0a && id>>12 == id>>4&0xf && id < 0x8000 }

func TestOwnLeavesSayWhatTheyUnderstand(t *testing.T) {
	old := Capabilities{Versions: []ProtocolVersion{MLS10}, CipherSuites: CipherSuites(), Credentials: []CredentialType{CredentialBasic}}
	given := Extensions{{ExtensionAppDataDictionary, codec.Marshal(AppDataDictionary(nil).
		Set(ComponentAppComponents, codec.Marshal(ComponentsList{ComponentAppComponents, 0x8001})).
		Set(ComponentSafeAAD, codec.Marshal(ComponentsList{0x8001})))}}
	for _, c := range []struct {
		name         string
		capabilities Capabilities
		extensions   Extensions
		want         ComponentsList // without reserved ones; nil: no dictionary
		aad          ComponentsList
		grease       bool
	}{
		{"default", Capabilities{}, nil, ComponentsList{1, 2}, nil, true},
		{"default, with components", Capabilities{}, given, ComponentsList{1, 2, 0x8001}, ComponentsList{0x8001}, true},
		{"chosen", DefaultCapabilities(), given, ComponentsList{1, 2, 0x8001}, ComponentsList{0x8001}, false},
		{"without a dictionary", old, nil, nil, nil, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			kp, _, err := NewKeyPackage(KeyPackageOptions{Suite: testSuite, Credential: BasicCredential([]byte("x")), Signer: newSigner(t, testSuite),
				Capabilities: c.capabilities, LeafExtensions: c.extensions, LastResort: c.want != nil})
			if err != nil {
				t.Fatal(err)
			}
			got, err := parseTerms(kp.LeafNode.Extensions)
			if err != nil {
				t.Fatal(err)
			}
			for _, l := range []struct{ got, want ComponentsList }{{got.components, c.want}, {got.safeAAD, c.aad}} {
				if n := len(l.got); (n > 0 && reserved(l.got[n-1])) != (c.grease && l.want != nil) {
					t.Errorf("list %x", l.got)
				}
				if l.got = slices.DeleteFunc(l.got, reserved); !slices.Equal(l.got, l.want) {
					t.Errorf("got %x, want %x", l.got, l.want)
				}
			}
			for where, ext := range map[string]Extensions{"leaf": kp.LeafNode.Extensions, "key package": kp.Extensions} {
				d, err := dictionaryOf(ext)
				if err != nil {
					t.Fatal(err)
				}
				if has := slices.ContainsFunc(d, func(x ComponentData) bool { return reserved(x.ID) }); has != c.grease {
					t.Errorf("%s: reserved entry: %v", where, has)
				}
			}
			if err := kp.Validate(time.Now(), testVerifier{}); err != nil {
				t.Error(err)
			}
		})
	}
	if _, _, err := NewKeyPackage(KeyPackageOptions{Suite: testSuite, Credential: BasicCredential([]byte("x")), Signer: newSigner(t, testSuite),
		LeafExtensions: Extensions{{ExtensionAppDataDictionary, []byte{9}}}}); err == nil {
		t.Error("a dictionary that isn't one is published")
	}
}

// A group asks for a wire format that its members list, and of new ones too.
func TestRequiredWireFormatsAreAskedOfAll(t *testing.T) {
	const format WireFormat = 0xf123
	supported := Extensions{{ExtensionSupportedWireFormats, codec.Marshal(WireFormats{0xf124, format})}}
	o := GroupOptions{GroupID: []byte("group"), Suite: testSuite, Credential: BasicCredential([]byte("alice")), Signer: newSigner(t, testSuite),
		Extensions: Extensions{{ExtensionRequiredWireFormats, codec.Marshal(WireFormats{format})}}}
	lacks := func(what string, err error) {
		t.Helper()
		var ve *ValidationError
		if !errors.As(err, &ve) || ve.Section != sectionNegotiation {
			t.Errorf("%s: got %v, want a violation of %s", what, err, sectionNegotiation)
		}
	}
	lacks("creator", second(NewGroup(testConfig(), nil, o)))
	o.LeafExtensions = supported
	g, err := NewGroup(testConfig(), nil, o)
	if err != nil {
		t.Fatal(err)
	}
	gi, err := g.GroupInfo(true, true)
	if err != nil {
		t.Fatal(err)
	}
	join := ExternalJoinOptions{GroupInfo: gi, Credential: BasicCredential([]byte("bob")), Signer: newSigner(t, testSuite)}
	lacks("joiner", second(ExternalJoin(testConfig(), join)))
	join.LeafExtensions = supported
	if _, err := ExternalJoin(testConfig(), join); err != nil {
		t.Error(err)
	}
	_, kp, _ := keyPackage(t, testSuite, "carol")
	lacks("committer", second(g.Commit(nil, CommitOptions{Proposals: []Proposal{add(kp)}})))
	lacks("proposer", second(g.Propose(nil, nil, add(kp))))
}
