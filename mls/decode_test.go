package mls

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/parley-mls/parley/mls/codec"
)

// decoder is a type that crosses a wire or is stored, with encodings of it.
type decoder struct {
	zero  codec.Unmarshaler
	loose bool // of the store's: more than one encoding is read
	seeds [][]byte
}

// decoders are all types of the package that are decoded. The corpus of FuzzDecode has their numbers: add at the end.
func decoders(t testing.TB) []decoder {
	s := newSeeds(t)
	one := func(m ...codec.Marshaler) [][]byte {
		var out [][]byte
		for _, m := range m {
			out = append(out, codec.Marshal(m))
		}
		return out
	}
	var psks, proposals [][]byte
	for _, id := range s.psks {
		psks = append(psks, codec.Marshal(id))
	}
	for _, p := range s.proposals {
		proposals = append(proposals, append([]byte{1}, p...))
	}
	bodies := make(map[ProposalType][]byte)
	for _, b := range s.proposals {
		bodies[ProposalType(b[0])<<8|ProposalType(b[1])] = b[2:]
	}
	body := func(t ProposalType) [][]byte { return [][]byte{bodies[t]} }
	es := testSuite.epochSecretsFrom(make(secret, 32))
	group := newForgery(t)
	_, kp, _ := keyPackage(t, testSuite, "new")
	c, err := group.alice.Commit(nil, CommitOptions{Proposals: []Proposal{add(kp)}})
	group.must(err)
	receiver := ExternalReceiver{s.keyPackage.InitKey, BasicCredential([]byte("hub"))}
	semi := &SemiPrivateMessage{GroupID: []byte("g"), Epoch: 7, ContentType: ContentCommit, PartialContextHash: make([]byte, 32),
		Keys:                 []KeyForExternalReceiver{{receiver.ref(testSuite), s.path.Nodes[0].Secrets[0]}},
		FramedContentTBSHash: make([]byte, 32), EncryptedSenderData: []byte("sender"), Ciphertext: []byte("content")}
	s.whole = append(s.whole, codec.Marshal(NewMLSMessage(semi)))
	return []decoder{
		{new(MLSMessage), false, s.whole},
		{new(PublicMessage), false, s.public},
		{new(PrivateMessage), false, s.private},
		{new(AuthenticatedContent), false, s.authenticated},
		{new(FramedContent), false, s.framed},
		{new(Sender), false, [][]byte{{1, 0, 0, 0, 1}, {2, 0, 0, 0, 1}, {3}, {4}}},
		{new(Proposal), false, s.proposals},
		{new(Add), false, body(ProposalAdd)},
		{new(Update), false, body(ProposalUpdate)},
		{new(Remove), false, body(ProposalRemove)},
		{new(PreSharedKey), false, psks},
		{new(ReInit), false, body(ProposalReInit)},
		{new(ExternalInit), false, body(ProposalExternalInit)},
		{new(GroupContextExtensions), false, body(ProposalGroupContextExtensions)},
		{new(AppDataUpdate), false, body(ProposalAppDataUpdate)},
		{new(ProposalOrRef), false, append(proposals, append([]byte{2, 32}, make([]byte, 32)...))},
		{new(Commit), false, s.commits},
		{new(UpdatePath), false, one(s.path)},
		{new(UpdatePathNode), false, one(s.path.Nodes[0])},
		{new(HPKECiphertext), false, one(s.path.Nodes[0].Secrets[0])},
		{new(KeyPackage), false, one(s.keyPackage)},
		{new(LeafNode), false, [][]byte{s.leafKeyPackage, s.leafUpdate, s.leafPath}},
		{new(Capabilities), false, one(DefaultCapabilities())},
		{new(Credential), false, one(BasicCredential([]byte("id")), X509Credential([][]byte{{1, 2}, {3}}))},
		{new(ParentNode), false, one(&ParentNode{EncryptionKey: []byte("key"), ParentHash: []byte("hash"), UnmergedLeaves: []LeafIndex{1, 3}})},
		{new(RatchetTree), false, one(s.tree.RatchetTree)},
		{new(GroupContext), false, one(s.context)},
		{new(GroupInfo), false, one(s.groupInfo)},
		{new(Welcome), false, one(s.welcome)},
		{new(EncryptedGroupSecrets), false, one(s.welcome.Secrets[0])},
		{new(GroupSecrets), false, s.groupSecrets},
		{new(PreSharedKeyID), false, psks},
		{new(Extension), false, one(Extension{1, []byte("x")})},
		{new(Extensions), false, one(Extensions{}, Extensions{{1, []byte("x")}, {0x0a0a, nil}})},
		{new(RequiredCapabilities), false, [][]byte{{0, 0, 0}, {2, 0, 6, 2, 0, 8, 4, 0, 1, 0, 2}}},
		{new(ExternalSender), false, one(ExternalSender{[]byte("key"), BasicCredential([]byte("hub"))})},
		{new(ExternalSenders), false, one(ExternalSenders{{[]byte("key"), BasicCredential([]byte("hub"))}})},
		{new(ComponentsList), false, one(ComponentsList{1, 0x8001})},
		{new(AppDataDictionary), false, one(AppDataDictionary{{1, []byte("a")}, {7, nil}})},
		{new(senderData), false, one(senderData{leaf: 1, generation: 2})},
		{new(KeyPackageSecrets), false, one(KeyPackageSecrets{InitKey: []byte("init"), EncryptionKey: []byte("leaf")})},
		{new(pendingEntry), false, one(&pendingEntry{PendingProposal: PendingProposal{Ref: []byte("ref"), Sender: Sender{Type: SenderMember}, Proposal: remove(1)}},
			&pendingEntry{PendingProposal: PendingProposal{Ref: []byte("ref"), Sender: Sender{Type: SenderMember}, Proposal: selfRemove()},
				message: group.proposal(group.bob, selfRemove()).Public})},
		{new(treePrivate), true, one(s.tree.private[1])},
		{new(epochSecrets), false, one(es)},
		{new(pastEpoch), true, one(&pastEpoch{context: s.context, senderData: es.senderData, resumption: es.resumption})},
		{new(header), true, one(&header{kind: kindGroup, slots: 4, context: s.context, active: true, secrets: es}, &header{kind: kindPublicGroup, context: s.context})},
		{new(PendingCommit), true, one(c)},
		{new(AppEphemeral), false, body(ProposalAppEphemeral)},
		{new(AppAck), false, one(AppAck{}, AppAck{{1, 2, 3}, {2, 0, 0}})},
		{new(MessageRange), false, one(MessageRange{1, 2, 2})},
		{new(ExternalReceiver), false, one(receiver)},
		{new(ExternalReceivers), false, one(ExternalReceivers{}, ExternalReceivers{receiver, receiver})},
		{new(KeyForExternalReceiver), false, one(semi.Keys[0])},
		{new(SemiPrivateMessage), false, one(semi)},
		{new(messageKeys), false, one(&messageKeys{key: make(secret, 16), nonce: make(secret, 12), sender: 3})},
		{new(WireFormats), false, one(WireFormats{}, WireFormats{1, 0xf123})},
		{new(SafeAAD), false, one(SafeAAD{}, SafeAAD{{1, []byte("a")}, {7, nil}})},
		{new(MediaType), false, one(textPlain)},
		{new(MediaTypeList), false, one(MediaTypeList{textPlain}, MediaTypeList{png, textPlain})},
		{new(ApplicationFraming), false, one(ApplicationFraming{textPlain, []byte("text")}, ApplicationFraming{})},
	}
}

// FuzzDecode feeds mutations of encodings to the decoder of their type: what decodes must encode to the same bytes.
func FuzzDecode(f *testing.F) {
	all := decoders(f)
	for i, d := range all {
		for _, s := range d.seeds {
			f.Add(byte(i), s)
		}
	}
	f.Fuzz(func(t *testing.T, which byte, in []byte) {
		d := all[int(which)%len(all)]
		v := d.make()
		if codec.Unmarshal(in, v) != nil {
			return
		}
		out := codec.Marshal(v.(codec.Marshaler))
		if d.loose {
			if err := codec.Unmarshal(out, d.make()); err != nil {
				t.Errorf("%T: %x decoded, encoded and decoded: %v", v, in, err)
			}
		} else if !bytes.Equal(out, in) {
			t.Errorf("%T: %x decoded and encoded gives %x", v, in, out)
		}
	})
}

func (d *decoder) make() codec.Unmarshaler {
	return reflect.New(reflect.TypeOf(d.zero).Elem()).Interface().(codec.Unmarshaler)
}

func TestEncodingsAreDecoded(t *testing.T) {
	for _, d := range decoders(t) {
		if len(d.seeds) == 0 {
			t.Errorf("no encoding of %T", d.zero)
		}
		for _, s := range d.seeds {
			v := d.make()
			if err := codec.Unmarshal(s, v); err != nil {
				t.Errorf("%T: %x: %v", d.zero, s, err)
			} else if out := codec.Marshal(v.(codec.Marshaler)); !bytes.Equal(out, s) {
				t.Errorf("%T: %x decoded and encoded gives %x", d.zero, s, out)
			}
			if err := codec.Unmarshal(append(bytes.Clone(s), 0), d.make()); err == nil {
				t.Errorf("%T: a byte too many is accepted", d.zero)
			}
			for i := range s {
				if err := codec.Unmarshal(s[:i], d.make()); err == nil && !d.loose {
					t.Errorf("%T: %d of %d bytes are accepted", d.zero, i, len(s))
				}
			}
		}
	}
}

func TestEveryDecoderIsFuzzed(t *testing.T) {
	have := make(map[string]bool)
	for _, d := range decoders(t) {
		have[reflect.TypeOf(d.zero).Elem().Name()] = true
	}
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	method := regexp.MustCompile(`(?m)^func \(\w+ \*?(\w+)\) UnmarshalMLS\(`)
	found := 0
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range method.FindAllSubmatch(text, -1) {
			found++
			if !have[string(m[1])] {
				t.Errorf("%s isn't among the decoders that FuzzDecode feeds", m[1])
			}
		}
	}
	if found < 40 {
		t.Errorf("%d decoders in the source", found)
	}
}

// TestWhatIsNotOfItsTypeIsRefused: enumerations are closed where RFC 9420 lets no value be ignored.
func TestWhatIsNotOfItsTypeIsRefused(t *testing.T) {
	for _, v := range []struct {
		rule string
		into codec.Unmarshaler
		in   string
	}{
		{"version", new(MLSMessage), "\x00\x02\x00\x05"},
		{"wire format", new(MLSMessage), "\x00\x01\x00\x00"},
		{"wire format of authenticated content", new(AuthenticatedContent), "\x00\x03\x00\x00\x00\x00\x00\x00\x00\x00\x00\x03\x00\x01\x00\x00"},
		{"sender type 0", new(Sender), "\x00"},
		{"sender type 5", new(Sender), "\x05"},
		{"content type", new(FramedContent), "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x03\x00\x04"},
		{"content type 0 of a private message", new(PrivateMessage), "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"},
		{"content type 4 of a private message", new(PrivateMessage), "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x04\x00\x00\x00"},
		{"proposal type", new(Proposal), "\x0a\x0a"},
		{"proposal or reference", new(ProposalOrRef), "\x03"},
		{"reference longer than a hash", new(ProposalOrRef), "\x02\x40\x41" + strings.Repeat("\x00", 65)},
		{"operation on application data", new(AppDataUpdate), "\x00\x01\x03"},
		{"source of a leaf", new(LeafNode), "\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x04\x00\x00"},
		{"credential type", new(Credential), "\x0a\x0a\x00"},
		{"type of pre-shared key", new(PreSharedKeyID), "\x00\x00"},
		{"usage 0 of a resumption key", new(PreSharedKeyID), "\x02\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"},
		{"usage 4 of a resumption key", new(PreSharedKeyID), "\x02\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"},
		{"version of a group", new(GroupContext), "\x00\x02\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"},
		{"presence of a path", new(Commit), "\x00\x02"},
		{"unmerged leaves that do not ascend", new(ParentNode), "\x00\x00\x08\x00\x00\x00\x01\x00\x00\x00\x01"},
		{"extension twice", new(Extensions), "\x06\x00\x01\x00\x00\x01\x00"},
		{"257 extensions", new(Extensions), manyExtensions(257)},
		{"application data for external receivers", new(SemiPrivateMessage), "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00"},
		{"messages that end before they begin", new(MessageRange), "\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00"},
		{"media types that are none", new(MediaTypeList), "\x00"},
		{"257 media types", new(MediaTypeList), "\x42\x02" + strings.Repeat("\x00\x00", 257)},
		{"authenticated data out of order", new(SafeAAD), "\x06\x00\x02\x00\x00\x01\x00"},
		{"dictionary out of order", new(AppDataDictionary), "\x06\x00\x02\x00\x00\x01\x00"},
		{"dictionary with a component twice", new(AppDataDictionary), "\x06\x00\x01\x00\x00\x01\x00"},
		{"tree of no nodes", new(RatchetTree), "\x00"},
		{"tree that ends with a blank node", new(RatchetTree), "\x01\x00"},
		{"parent where a leaf is", new(RatchetTree), "\x05\x01\x02\x00\x00\x00"},
	} {
		t.Run(v.rule, func(t *testing.T) {
			if err := codec.Unmarshal([]byte(v.in), v.into); err == nil {
				t.Errorf("%x is accepted", v.in)
			} else if errors.Is(err, codec.ErrTruncated) || errors.Is(err, codec.ErrTrailing) {
				t.Errorf("%x is refused for its length: %v", v.in, err)
			}
		})
	}
}

func manyExtensions(n int) string {
	var w codec.Writer
	w.Vector(func(w *codec.Writer) {
		for i := range n {
			Extension{Type: ExtensionType(i)}.MarshalMLS(w)
		}
	})
	return string(w.Bytes())
}
