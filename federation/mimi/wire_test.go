package mimi

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// wire is a type of the protocol: it encodes by value and decodes by pointer.
type wire interface {
	codec.Marshaler
	codec.Unmarshaler
}

// decoders makes an empty value of each type.
var decoders = []func() wire{
	func() wire { return new(URI) },
	func() wire { return new(KeyMaterialRequest) },
	func() wire { return new(KeyMaterialResponse) },
	func() wire { return new(UpdateRequest) },
	func() wire { return new(UpdateRoomResponse) },
	func() wire { return new(SubmitMessageRequest) },
	func() wire { return new(SubmitMessageResponse) },
	func() wire { return new(FanoutMessage) },
	func() wire { return new(GroupInfoRequest) },
	func() wire { return new(GroupInfoResponse) },
	func() wire { return new(GroupInfoRatchetTree) },
	func() wire { return new(IdentifierRequest) },
	func() wire { return new(IdentifierResponse) },
	func() wire { return new(RatchetTreeOption) },
	func() wire { return new(GroupInfoOption) },
	func() wire { return new(ParticipantList) },
	func() wire { return new(ParticipantListUpdate) },
	func() wire { return new(RoomMetadata) },
	func() wire { return new(Frank) },
	func() wire { return new(FrankAAD) },
	func() wire { return new(FrankingAgentData) },
	func() wire { return new(ServerFrankingContext) },
	func() wire { return new(ConsentScope) },
	func() wire { return new(ConsentEntry) },
	func() wire { return new(AbuseReport) },
	func() wire { return new(Ephemeral) },
	func() wire { return new(RoleList) },
	func() wire { return new(Preauthorized) },
	func() wire { return new(BasePolicy) },
	func() wire { return new(JoinLinkPolicy) },
	func() wire { return new(JoinLinks) },
	func() wire { return new(JoinLinksUpdate) },
	func() wire { return new(JoiningCode) },
	func() wire { return new(HistoryPolicy) },
	func() wire { return new(HistoryOffer) },
	func() wire { return new(HistoryPages) },
	func() wire { return new(HistoryMessages) },
	func() wire { return new(BotPolicy) },
	func() wire { return new(MessageExpiration) },
	func() wire { return new(LeafRenewal) },
	func() wire { return new(GatewayKeys) },
	func() wire { return new(AssetPolicy) },
}

// unhex reads hexadecimal with spaces and quoted text in it: 'abc' stands for its bytes.
func unhex(t testing.TB, s string) []byte {
	t.Helper()
	var out []byte
	for i, part := range strings.Split(s, "'") {
		if i%2 == 1 {
			out = append(out, part...)
			continue
		}
		b, err := hex.DecodeString(strings.Join(strings.Fields(part), ""))
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, b...)
	}
	return out
}

var golden = []struct {
	name  string
	value wire
	hex   string
}{
	{"IdentifierUri", ptr(URI("mimi://a.example/u/alice")), "18 'mimi://a.example/u/alice'"},
	{"AssetPolicy", &AssetPolicy{Location: AssetsLocal, Domains: []UploadDomains{{"a.b", []string{"c.d", "a.b"}}}, Allowed: []DownloadType{DownloadHubProxy, DownloadOblivious},
		ForbiddenDownloads: []DownloadType{DownloadDirect}, Default: DownloadOblivious, MaxImage: 1, MaxAudio: 2, MaxVideo: 3, MaxAttachment: 4,
		ForbiddenMedia: mls.MediaTypeList{{Type: "x/y"}}, PermittedMedia: mls.MediaTypeList{{Type: "z/z"}}},
		"01 0d 03 'a.b' 08 03 'c.d' 03 'a.b' 02 0102 01 00 02 0000000000000001 0000000000000002 0000000000000003 0000000000000004 05 03 'x/y' 00 01 05 03 'z/z' 00"},
	{"AssetPolicy that forbids nothing", &AssetPolicy{}, "00 00 00 00 00" + strings.Repeat("00", 32) + "00 00"},
	{"GatewayKeys", &GatewayKeys{Hub: "mimi://a.example", NotAfter: 7, Keys: []byte{1, 2}, Signature: []byte{3}},
		"10 'mimi://a.example' 0000000000000007 02 0102 01 03"},
	{"UpdateRoomResponse success", &UpdateRoomResponse{AcceptedTimestamp: 0x0102030405060708}, "00 00 0102030405060708"},
	{"UpdateRoomResponse wrongEpoch", &UpdateRoomResponse{Code: UpdateWrongEpoch, Description: "late", CurrentEpoch: 7}, "01 04 'late' 0000000000000007"},
	{"UpdateRoomResponse notAllowed", &UpdateRoomResponse{Code: UpdateNotAllowed, Description: "no"}, "02 02 'no'"},
	{"UpdateRoomResponse invalidProposal", &UpdateRoomResponse{Code: UpdateInvalidProposal, InvalidProposals: [][]byte{{1, 2}, {3}}}, "03 00 05 02 0102 01 03"},
	{"SubmitMessageResponse accepted", &SubmitMessageResponse{AcceptedTimestamp: 1}, "01 00 0000000000000001 00"},
	{"SubmitMessageResponse with a frank", &SubmitMessageResponse{AcceptedTimestamp: 1, Frank: &Frank{ServerFrank: [32]byte{0xaa, 31: 0xbb}, CipherSuite: 1, Signature: []byte{9}}},
		"01 00 0000000000000001 01 aa" + strings.Repeat("00", 30) + "bb 0001 01 09"},
	{"SubmitMessageResponse notAllowed", &SubmitMessageResponse{Code: SubmitNotAllowed}, "01 01"},
	{"SubmitMessageResponse epochTooOld", &SubmitMessageResponse{Code: SubmitEpochTooOld, CurrentEpoch: 258}, "01 02 0000000000000102"},
	{"KeyMaterialResponse userUnknown", &KeyMaterialResponse{Code: UserUnknown, User: "mimi://a.example/u/bob"}, "01 04 16 'mimi://a.example/u/bob' 00"},
	{"KeyMaterialResponse noCompatibleMaterial", &KeyMaterialResponse{Code: NoCompatibleMaterial, User: "mimi://a.example/u/bob", Clients: []ClientKeyMaterial{
		{Code: KeyMaterialExhausted, Client: "mimi://a.example/d/b1"}, {Code: NothingCompatible, Client: "mimi://a.example/d/b2"},
	}}, "01 03 16 'mimi://a.example/u/bob' 2f 01 15 'mimi://a.example/d/b1' 02 15 'mimi://a.example/d/b2' 00"},
	{"GroupInfoResponse noSuchRoom", &GroupInfoResponse{Room: "mimi://a.example/r/x", Code: GroupInfoNoSuchRoom}, "01 14 'mimi://a.example/r/x' 03"},
	{"IdentifierRequest", &IdentifierRequest{Elements: []QueryElement{{Type: SearchHandle, Value: []byte("bob@b.c")}, {Type: SearchVCardField, Name: "ORG", Value: []byte("X")}}},
		"10 01 07 'bob@b.c' 08 03 'ORG' 01 'X' 00"},
	{"IdentifierResponse", &IdentifierResponse{URIs: []URI{"mimi://b.c/u/bob"}}, "00 11 10 'mimi://b.c/u/bob' 00 00"},
	{"IdentifierResponse with a profile", &IdentifierResponse{Profiles: []UserProfile{{User: "mimi://b.c/u/bob", Fields: []ProfileField{{Source: FieldOIDCStdClaim, Name: "name", Value: []byte("Bob")}}}}},
		"00 00 1c 10 'mimi://b.c/u/bob' 0a 07 04 'name' 03 'Bob' 00"},
	{"RatchetTreeOption httpsUri", &RatchetTreeOption{Representation: RatchetTreeHTTPSURI, URL: "https://a.b/t", Signature: []byte{1}}, "02 0d 'https://a.b/t' 01 01"},
	{"RatchetTreeOption outOfBand", &RatchetTreeOption{Representation: RatchetTreeOutOfBand, Signature: []byte{1}}, "03 01 01"},
	{"RatchetTreeOption distributionService", &RatchetTreeOption{Representation: RatchetTreeDistributionService}, "04"},
	{"GroupInfoOption partial", &GroupInfoOption{Partial: &PartialGroupInfo{Presence: RatchetTreeAdded, Signature: []byte{5}}}, "02 03 00 01 05"},
	{"ParticipantListData", &ParticipantList{{"mimi://a.example/u/alice", RoleAdmin}, {"mimi://b.c/u/bob", RoleMember}}, "32 18 'mimi://a.example/u/alice' 00000004 10 'mimi://b.c/u/bob' 00000002"},
	{"ParticipantListUpdate", &ParticipantListUpdate{Changed: []RoleChange{{2, 1}}, Removed: []uint32{0, 1}, Added: []Participant{{"mimi://b.c/u/bob", 3}}},
		"08 00000002 00000001 08 00000000 00000001 15 10 'mimi://b.c/u/bob' 00000003"},
	{"RoomMetaData", &RoomMetadata{RoomURI: "mimi://a.b/r/x", RoomName: "X", Descriptions: []RichDescription{{LanguageTag: "en", Content: []byte("hi")}}, Avatar: "https://a.b/i", Subject: "s", Mood: "m"},
		"0e 'mimi://a.b/r/x' 01 'X' 07 00 02 'en' 02 'hi' 0d 'https://a.b/i' 01 's' 01 'm'"},
	{"FrankAAD", &FrankAAD{Tag: [32]byte{1, 31: 2}}, "01" + strings.Repeat("00", 30) + "02"},
	{"ServerFrankingContext", &ServerFrankingContext{Sender: "mimi://b.c/u/bob", Room: "mimi://a.b/r/x", AcceptedTimestamp: 5}, "10 'mimi://b.c/u/bob' 0e 'mimi://a.b/r/x' 0000000000000005"},
	{"FrankingAgentData", &FrankingAgentData{SignatureKey: []byte{1, 2}, Credential: mls.BasicCredential([]byte("h"))}, "02 0102 0001 01 'h'"},
	{"ConsentEntry request", &ConsentEntry{Operation: ConsentRequest, Scope: ConsentScope{Requester: "mimi://b.c/u/bob", Target: "mimi://a.b/u/al", Room: "mimi://a.b/r/x"}},
		"01 10 'mimi://b.c/u/bob' 0f 'mimi://a.b/u/al' 01 0e 'mimi://a.b/r/x' 00"},
	{"Ephemeral typing", &Ephemeral{Kind: EphemeralTyping}, "01 0000000000000000"},
	{"Ephemeral receipt", &Ephemeral{Kind: EphemeralReceipt, Seq: 5}, "03 0000000000000005"},
	{"ConsentEntry grant", &ConsentEntry{Operation: ConsentGrant, Scope: ConsentScope{Requester: "mimi://b.c/u/bob", Target: "mimi://a.b/u/al"}},
		"02 10 'mimi://b.c/u/bob' 0f 'mimi://a.b/u/al' 00 00 00"},
	{"AbuseReport", &AbuseReport{AllegedAbuser: "mimi://b.c/u/bob", ReasonCode: 1, Note: "x", Messages: []AbusiveMessage{{Content: []byte("c"), Frank: Frank{CipherSuite: 2}, AcceptedTimestamp: 3}}},
		"00 10 'mimi://b.c/u/bob' 01 01 'x' 2d 01 'c'" + strings.Repeat("00", 32) + "0002 00 0000000000000003 00"},
	{"RoleData", &RoleList{{Index: 3, Name: "x", Description: "y", Capabilities: []Capability{CanBan, CanSendMessage}, MinParticipants: 1, MaxParticipants: ptr(uint32(2)), Changes: []RoleChanges{{0, []uint32{3}}}}},
		"25 00000003 01 'x' 01 'y' 04 000a 0100 00000001 01 00000002 00000000 00 09 00000000 04 00000003"},
	{"PreAuthData", &Preauthorized{{Claims: []Claim{ProviderClaim("mimi://a.b")}, Role: 2}}, "18 13 0002 05 0603551d12 0a 'mimi://a.b' 00000002"},
	{"BaseRoomPolicy", &BasePolicy{FixedMembership: true, MaxClients: ptr(uint32(7)), Discoverable: true, Components: mls.ComponentsList{ComponentRoles}},
		"01 00 00 00 01 00000007 00 00 00 01 02 0025"},
	{"JoinLinkPolicy", &JoinLinkPolicy{RequestURI: "x", MultiUser: true, Expiration: 5}, "00 01 'x' 01 00000005"},
	{"JoinLinksData", &JoinLinks{testLink}, "2f 2e 20" + strings.Repeat("00", 32) + "00000002 01 0000000000000009"},
	{"JoinLinksUpdate", &JoinLinksUpdate{Removed: []uint32{4}, Added: JoinLinks{testLink}}, "04 00000004 2f 2e 20" + strings.Repeat("00", 32) + "00000002 01 0000000000000009"},
	{"JoiningCode", &JoiningCode{Key: make([]byte, 32), Signature: []byte{1, 2}}, "20" + strings.Repeat("00", 32) + "02 0102"},
	{"HistoryPolicy", &HistoryPolicy{Roles: []uint32{4}, Automatic: true, MaxPeriod: 60}, "00 04 00000004 01 0000003c"},
	{"HistoryOffer", &HistoryOffer{To: 2, Sealed: mls.HPKECiphertext{KEMOutput: []byte{1}, Ciphertext: []byte{2, 3}}}, "00000002 01 01 02 0203"},
	{"HistoryPages", &HistoryPages{{Hash: [32]byte{1}, Size: 5, Key: [16]byte{2}, Nonce: [12]byte{3}}},
		"4040 01" + strings.Repeat("00", 31) + "00000005 02" + strings.Repeat("00", 15) + "03" + strings.Repeat("00", 11)},
	{"HistoryMessages", &HistoryMessages{{Seq: 7, User: "mimi://b.c/u/bob", Client: "mimi://b.c/d/b", Time: 8, Expires: 9, Moderates: true, Application: []byte("x")}},
		"3c 0000000000000007 10 'mimi://b.c/u/bob' 0e 'mimi://b.c/d/b' 0000000000000008 0000000000000009 01 01 'x' 00"},
	{"HistoryPolicy forbidden", &HistoryPolicy{Sharing: Forbidden}, "02"},
	{"BotPolicy", &BotPolicy{{Name: "b", Description: "d", Homepage: "h", Role: 2, PerUser: true}}, "0d 01 'b' 01 'd' 01 'h' 00 00000002 00 01"},
	{"MessageExpiration", &MessageExpiration{Expiring: Required, Min: 1, Max: 3, Default: ptr(uint32(2))}, "01 00000001 00000003 01 00000002"},
	{"LeafRenewal", &LeafRenewal{Days: 30}, "001e"},
	{"KeyMaterialRequest", &KeyMaterialRequest{RequestingUser: "mimi://b.c/u/bob", TargetUser: "mimi://a.b/u/al", Room: "mimi://a.b/r/x", CipherSuites: []mls.CipherSuite{1, 2},
		RequiredCapabilities: required(), SignatureKey: []byte{7}, Credential: mls.BasicCredential([]byte("b")), Signature: []byte{8, 9}},
		"01 10 'mimi://b.c/u/bob' 0f 'mimi://a.b/u/al' 0e 'mimi://a.b/r/x' 04 0001 0002 02 0006 02 0008 00 01 07 0001 01 'b' 02 0809"},
	{"GroupInfoRequest", &GroupInfoRequest{CipherSuite: 1, SignatureKey: []byte{7}, Credential: mls.BasicCredential([]byte("b")), GroupInfoPublicKey: mls.HPKEPublicKey{6}, Signature: []byte{8}},
		"01 0001 01 07 0001 01 'b' 01 06 00 01 08"},
}

// testLink is a link with a key of zeros.
var testLink = JoinLink{Key: make([]byte, 32), Role: 2, MultiUser: true, Expires: 9}

func ptr[T any](v T) *T { return &v }

func TestEncodingsAreThoseOfTheDraft(t *testing.T) {
	for _, c := range golden {
		t.Run(c.name, func(t *testing.T) {
			want := unhex(t, c.hex)
			if got := codec.Marshal(c.value); !bytes.Equal(got, want) {
				t.Fatalf("encodes to\n%x, want\n%x", got, want)
			}
			v := reflect.New(reflect.TypeOf(c.value).Elem()).Interface().(wire)
			if err := codec.Unmarshal(want, v); err != nil {
				t.Fatal(err)
			}
			if again := codec.Marshal(v); !bytes.Equal(again, want) {
				t.Errorf("decodes and encodes to\n%x, want\n%x", again, want)
			}
			refusesParts(t, v, want)
		})
	}
}

// refusesParts checks that no prefix of an encoding decodes, nor the encoding with a byte after it.
func refusesParts(t *testing.T, v wire, b []byte) {
	t.Helper()
	step := max(1, len(b)/300)
	for n := 0; n < len(b); n += step {
		if codec.Unmarshal(b[:n], v) == nil {
			t.Errorf("the first %d bytes of %d decode", n, len(b))
		}
	}
	if err := codec.Unmarshal(append(slices.Clone(b), 0), v); err == nil {
		t.Error("a trailing byte is accepted")
	}
}

// samples are encodings with real MLS structures in them, by type.
func samples(t testing.TB) []wire {
	r := newTestRoom(t)
	app, err := r.members["bob1"].Encrypt(nil, []byte("aad"), []byte("hello"))
	if err != nil {
		t.Fatal(err)
	}
	proposal, err := r.members["bob1"].Propose(nil, nil, r.remove("bob2"))
	if err != nil {
		t.Fatal(err)
	}
	carol := r.members["carol1"]
	commit, err := carol.Commit(nil, mls.CommitOptions{Proposals: []mls.Proposal{r.addProposal("dave1")}})
	if err != nil {
		t.Fatal(err)
	}
	kp, _ := r.keyPackage("dave2")
	gi, err := r.members["alice1"].GroupInfo(false, true)
	if err != nil {
		t.Fatal(err)
	}
	tree := FullRatchetTree(commit.Tree())
	capabilities := mls.DefaultCapabilities()
	return []wire{
		&UpdateRequest{Bundle: HandshakeBundle{Message: commit.Message(), Welcome: commit.Welcome(), GroupInfo: FullGroupInfo(commit.GroupInfo()), RatchetTree: tree}},
		&UpdateRequest{Bundle: HandshakeBundle{Message: commit.Message(), GroupInfo: GroupInfoOption{Partial: new(PartialGroupInfo)}, RatchetTree: RatchetTreeOption{Representation: RatchetTreeDistributionService}}},
		&UpdateRequest{Bundle: HandshakeBundle{Message: proposal, MoreProposals: []*mls.MLSMessage{proposal, proposal}}},
		&SubmitMessageRequest{Message: app, Sender: user("bob1")},
		&FanoutMessage{Timestamp: 1, Message: app},
		&FanoutMessage{Timestamp: 1, Message: app, Frank: &Frank{CipherSuite: suite, Signature: []byte{1}}},
		&FanoutMessage{Timestamp: 2, Message: mls.NewMLSMessage(commit.Welcome()), RatchetTree: tree},
		&FanoutMessage{Timestamp: 3, Message: proposal, MoreProposals: []*mls.MLSMessage{proposal}},
		&FanoutMessage{Timestamp: 4, Message: commit.Message(), ExternalProposals: []*mls.MLSMessage{proposal}},
		&KeyMaterialResponse{Code: KeyMaterialPartialSuccess, User: user("dave"), Clients: []ClientKeyMaterial{
			{Client: client("dave1"), KeyPackage: kp}, {Code: NothingCompatible, Client: client("dave2"), Capabilities: &capabilities},
		}},
		&GroupInfoRatchetTree{GroupInfo: gi, RatchetTree: tree, Pending: []PendingProposal{{proposal, 5}}},
		&GroupInfoResponse{Room: "mimi://a.example/r/room", Code: GroupInfoSuccess, CipherSuite: suite, HubSender: externalSender(t, r.hubKey),
			Encrypted: mls.HPKECiphertext{KEMOutput: []byte{1}, Ciphertext: []byte{2}}, Signature: []byte{3}},
		&ConsentEntry{Operation: ConsentGrant, Scope: ConsentScope{Requester: user("alice"), Target: user("dave")}, KeyPackages: []mls.KeyPackage{*kp}},
	}
}

func TestStructuresOfRealGroupsDecodeToTheSameBytes(t *testing.T) {
	for _, s := range samples(t) {
		b := codec.Marshal(s)
		v := reflect.New(reflect.TypeOf(s).Elem()).Interface().(wire)
		if err := codec.Unmarshal(b, v); err != nil {
			t.Errorf("%T: %v", s, err)
			continue
		}
		if !bytes.Equal(codec.Marshal(v), b) {
			t.Errorf("%T encodes differently after decoding", s)
		}
		refusesParts(t, v, b)
	}
}

func TestWhatTheDraftForbidsDoesNotDecode(t *testing.T) {
	r := newTestRoom(t)
	app, err := r.members["bob1"].Encrypt(nil, nil, []byte("hello"))
	if err != nil {
		t.Fatal(err)
	}
	commit := r.commit("carol1")
	kp, _ := r.keyPackage("dave1")
	proposal, err := r.members["bob1"].Propose(nil, nil, r.remove("bob2"))
	if err != nil {
		t.Fatal(err)
	}
	encode := func(parts ...any) []byte {
		var w codec.Writer
		for _, p := range parts {
			switch v := p.(type) {
			case codec.Marshaler:
				v.MarshalMLS(&w)
			case string:
				w.Raw(unhex(t, v))
			}
		}
		return w.Bytes()
	}
	for _, c := range []struct {
		name  string
		value wire
		bytes []byte
	}{
		{"another protocol", new(SubmitMessageResponse), unhex(t, "02 01")},
		{"unknown update code", new(UpdateRoomResponse), unhex(t, "04 00")},
		{"unknown submit code", new(SubmitMessageResponse), unhex(t, "01 03")},
		{"unknown user code", new(KeyMaterialResponse), unhex(t, "01 08 16 'mimi://a.example/u/bob' 00")},
		{"clients with userUnknown", new(KeyMaterialResponse), unhex(t, "01 04 16 'mimi://a.example/u/bob' 17 01 15 'mimi://a.example/d/b1'")},
		{"client listed twice", new(KeyMaterialResponse), unhex(t, "01 03 16 'mimi://a.example/u/bob' 2e 01 15 'mimi://a.example/d/b1' 01 15 'mimi://a.example/d/b1'")},
		{"a room as user", new(KeyMaterialResponse), unhex(t, "01 04 14 'mimi://a.example/r/x' 00")},
		{"no cipher suites", new(KeyMaterialRequest), encode("01", user("a"), user("b"), "00 00", mls.RequiredCapabilities{}, "00", mls.BasicCredential(nil), "00")},
		{"reserved group info code", new(GroupInfoResponse), unhex(t, "01 14 'mimi://a.example/r/x' 00")},
		{"reserved representation", new(RatchetTreeOption), unhex(t, "00")},
		{"reserved search type", new(IdentifierRequest), unhex(t, "03 00 01 'x' 00")},
		{"search value that isn't UTF-8", new(IdentifierRequest), unhex(t, "03 01 01 ff 00")},
		{"description that isn't UTF-8", new(UpdateRoomResponse), unhex(t, "02 01 ff")},
		{"participant twice", new(ParticipantList), codec.Marshal(ParticipantList{{"mimi://b.c/u/bob", 2}, {"mimi://b.c/u/bob", 3}})},
		{"participant with role 0", new(ParticipantList), codec.Marshal(ParticipantList{{"mimi://b.c/u/bob", 0}})},
		{"a client as participant", new(ParticipantList), codec.Marshal(ParticipantList{{"mimi://b.c/d/bob", 2}})},
		{"empty URI as participant", new(ParticipantList), codec.Marshal(ParticipantList{{"", 2}})},
		{"role twice", new(RoleList), codec.Marshal(RoleList{{Index: 2}, {Index: 2}})},
		{"a role that lets strangers join", new(RoleList), codec.Marshal(RoleList{{Index: 2, Capabilities: []Capability{CanOpenJoin}}})},
		{"more roles than there may be", new(RoleList), codec.Marshal(func() (l RoleList) {
			for i := range uint32(MaxRoles + 1) {
				l = append(l, Role{Index: i})
			}
			return l
		}())},
		{"a role with less room than it needs", new(RoleList), codec.Marshal(RoleList{{Index: 2, MinActive: 2, MaxActive: ptr(uint32(1))}})},
		{"a preauthorization of everybody", new(Preauthorized), codec.Marshal(Preauthorized{{Role: 2}})},
		{"a room that depends on another", new(BasePolicy), unhex(t, "00 01 00 01 00 00 00 00 00 00")},
		{"a link to no role", new(JoinLinks), codec.Marshal(JoinLinks{{Key: make([]byte, 32), Role: 0}})},
		{"a link with a short key", new(JoinLinks), codec.Marshal(JoinLinks{{Key: make([]byte, 31), Role: 2}})},
		{"history that the banned share", new(HistoryPolicy), codec.Marshal(HistoryPolicy{Roles: []uint32{1}})},
		{"no page of history", new(HistoryPages), unhex(t, "00")},
		{"a page of history that is too large", new(HistoryPages), codec.Marshal(HistoryPages{{Size: MaxHistoryPage + 17}})},
		{"more pages of history than there may be", new(HistoryPages), codec.Marshal(make(HistoryPages, MaxHistoryPages+1))},
		{"history that repeats a number", new(HistoryMessages), codec.Marshal(HistoryMessages{historyOf(1), historyOf(1)})},
		{"history without a number", new(HistoryMessages), codec.Marshal(HistoryMessages{historyOf(0)})},
		{"history of a client of another provider's user", new(HistoryMessages), codec.Marshal(HistoryMessages{{Seq: 1, User: "mimi://a.b/u/al", Client: "mimi://b.c/d/al"}})},
		{"history of a time beyond all", new(HistoryMessages), codec.Marshal(HistoryMessages{{Seq: 1, User: user("bob"), Client: client("bob1"), Time: maxTime + 1}})},
		{"a default that is out of range", new(MessageExpiration), codec.Marshal(MessageExpiration{Min: 5, Max: 6, Default: ptr(uint32(7))})},
		{"assets anywhere else", new(AssetPolicy), codec.Marshal(AssetPolicy{Location: 3})},
		{"assets at two hubs", new(AssetPolicy), codec.Marshal(AssetPolicy{Location: AssetsAtHub, Domains: []UploadDomains{{"a.b", nil}, {"c.d", nil}}})},
		{"upload domains of one provider twice", new(AssetPolicy), codec.Marshal(AssetPolicy{Domains: []UploadDomains{{"a.b", nil}, {"a.b", nil}}})},
		{"a host that isn't a domain", new(AssetPolicy), codec.Marshal(AssetPolicy{Domains: []UploadDomains{{"a.b", []string{"1.2.3.4:80"}}}})},
		{"a default that is forbidden", new(AssetPolicy), codec.Marshal(AssetPolicy{ForbiddenDownloads: []DownloadType{DownloadDirect}})},
		{"a default that isn't allowed", new(AssetPolicy), codec.Marshal(AssetPolicy{Allowed: []DownloadType{DownloadOblivious}})},
		{"no media types permitted", new(AssetPolicy), codec.Marshal(AssetPolicy{PermittedMedia: mls.MediaTypeList{}})},
		{"renewal within no days", new(LeafRenewal), unhex(t, "0000")},
		{"submitted commit", new(SubmitMessageRequest), encode("01", commit, user("bob"))},
		{"submitted for a client", new(SubmitMessageRequest), encode("01", app, client("bob1"))},
		{"application message as handshake", new(UpdateRequest), encode(app, "00")},
		{"key package as handshake", new(UpdateRequest), encode(mls.NewMLSMessage(kp), "00")},
		{"key package fanned out", new(FanoutMessage), encode("0000000000000001", mls.NewMLSMessage(kp), "00")},
		{"commit among more proposals", new(UpdateRequest), codec.Marshal(&UpdateRequest{Bundle: HandshakeBundle{Message: proposal, MoreProposals: []*mls.MLSMessage{commit}}})},
		{"commit among external proposals", new(FanoutMessage), codec.Marshal(&FanoutMessage{Message: commit, ExternalProposals: []*mls.MLSMessage{commit}})},
	} {
		if err := codec.Unmarshal(c.bytes, c.value); err == nil {
			t.Errorf("%s is accepted", c.name)
		}
	}
	if err := codec.Unmarshal(unhex(t, "02 01"), new(SubmitMessageResponse)); !errors.Is(err, ErrProtocol) {
		t.Errorf("another protocol: got %v, want ErrProtocol", err)
	}
}

func historyOf(seq uint64) HistoryMessage {
	return HistoryMessage{Seq: seq, User: user("bob"), Client: client("bob1")}
}

func TestDescriptionsOfStrangersBytesStillDecode(t *testing.T) {
	for _, s := range []string{"a\xffb\x00c", strings.Repeat("é", 600), strings.Repeat("x", 5000)} {
		var got UpdateRoomResponse
		if err := codec.Unmarshal(codec.Marshal(&UpdateRoomResponse{Code: UpdateNotAllowed, Description: s}), &got); err != nil {
			t.Errorf("%.10q: %v", s, err)
		}
		if got.Description == "" || len(got.Description) > MaxDescription || got.Err() == nil {
			t.Errorf("%.10q became %.10q of %d bytes", s, got.Description, len(got.Description))
		}
	}
}

func TestFanoutMessagesAreSplitWhereTheyEnd(t *testing.T) {
	var want [][]byte
	var body []byte
	for _, s := range samples(t) {
		if f, ok := s.(*FanoutMessage); ok {
			want = append(want, codec.Marshal(f))
			body = append(body, want[len(want)-1]...)
		}
	}
	got, err := SplitFanout(body, len(want))
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("%d messages of %d, %v", len(got), len(want), err)
	}
	if _, err := SplitFanout(body, len(want)-1); !errors.Is(err, codec.ErrLength) {
		t.Errorf("one too many: %v", err)
	}
	if _, err := SplitFanout(body[:len(body)-1], 100); err == nil {
		t.Error("a truncated message is accepted")
	}
	if _, err := SplitFanout(nil, 100); err == nil {
		t.Error("an empty body is accepted")
	}
}

func TestSignedRequestsVerifyOnlyAsTheyWereSigned(t *testing.T) {
	signer := newSigner(t)
	q := &KeyMaterialRequest{RequestingUser: user("bob"), TargetUser: user("dave"), Room: "mimi://a.example/r/room", CipherSuites: []mls.CipherSuite{suite}, Credential: credential("bob1")}
	if err := q.Sign(rand.Reader, suite, signer); err != nil {
		t.Fatal(err)
	}
	var sent KeyMaterialRequest
	if err := codec.Unmarshal(codec.Marshal(q), &sent); err != nil {
		t.Fatal(err)
	}
	if err := sent.Verify(suite); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*KeyMaterialRequest){
		"target":       func(q *KeyMaterialRequest) { q.TargetUser = user("carol") },
		"room":         func(q *KeyMaterialRequest) { q.Room = "" },
		"suites":       func(q *KeyMaterialRequest) { q.CipherSuites = []mls.CipherSuite{2} },
		"capabilities": func(q *KeyMaterialRequest) { q.RequiredCapabilities = required() },
		"credential":   func(q *KeyMaterialRequest) { q.Credential = credential("eve1") },
		"signature":    func(q *KeyMaterialRequest) { q.Signature = bytes.Repeat([]byte{1}, 64) },
		"key":          func(q *KeyMaterialRequest) { q.SignatureKey = externalSender(t, newSigner(t)).SignatureKey },
	} {
		changed := sent
		change(&changed)
		if err := changed.Verify(suite); !errors.Is(err, mls.ErrSignature) {
			t.Errorf("changed %s: got %v, want ErrSignature", name, err)
		}
	}
}

func TestKeysOfTheGatewayAreTheHubs(t *testing.T) {
	signer := newSigner(t)
	key := externalSender(t, signer).SignatureKey
	k := &GatewayKeys{Hub: "mimi://a.example", NotAfter: 10, Keys: []byte("keys")}
	if err := k.Sign(rand.Reader, suite, signer); err != nil {
		t.Fatal(err)
	}
	if err := k.Verify(suite, key, "mimi://a.example", 9); err != nil {
		t.Error(err)
	}
	if err := k.Verify(suite, key, "mimi://a.example", 10); err == nil {
		t.Error("keys that are forgotten")
	}
	if err := k.Verify(suite, key, "mimi://b.example", 9); err == nil {
		t.Error("keys of another hub")
	}
	changed := *k
	changed.Keys = []byte("others")
	later := *k
	later.NotAfter++
	for name, err := range map[string]error{
		"other keys": changed.Verify(suite, key, "mimi://a.example", 9),
		"later":      later.Verify(suite, key, "mimi://a.example", 9),
		"signer":     k.Verify(suite, externalSender(t, newSigner(t)).SignatureKey, "mimi://a.example", 9),
	} {
		if !errors.Is(err, mls.ErrSignature) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestGroupInfoIsOpenedByTheRequesterOnly(t *testing.T) {
	r := newTestRoom(t)
	const room = URI("mimi://a.example/r/room")
	pub, private, err := suite.GenerateHPKEKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	q := &GroupInfoRequest{CipherSuite: suite, Credential: credential("dave1"), GroupInfoPublicKey: pub}
	if err := q.Sign(rand.Reader, newSigner(t)); err != nil {
		t.Fatal(err)
	}
	if err := q.Verify(); err != nil {
		t.Fatal(err)
	}
	changed := *q
	changed.JoiningCode = []byte("code")
	if err := changed.Verify(); !errors.Is(err, mls.ErrSignature) {
		t.Errorf("changed request: %v", err)
	}
	plain := &GroupInfoRatchetTree{GroupInfo: r.hub.GroupInfo(), RatchetTree: FullRatchetTree(r.hub.Tree())}
	resp, err := SealGroupInfo(rand.Reader, room, q, plain, r.hubKey, externalSender(t, r.hubKey))
	if err != nil {
		t.Fatal(err)
	}
	var got GroupInfoResponse
	if err := codec.Unmarshal(codec.Marshal(resp), &got); err != nil {
		t.Fatal(err)
	}
	opened, err := got.Open(room, private)
	if err != nil || !bytes.Equal(codec.Marshal(opened), codec.Marshal(plain)) {
		t.Fatalf("opened to something else: %v", err)
	}
	if _, err := got.Open("mimi://a.example/r/other", private); err == nil {
		t.Error("opened as the answer about another room")
	}
	_, other, err := suite.GenerateHPKEKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := got.Open(room, other); !errors.Is(err, mls.ErrDecrypt) {
		t.Errorf("another key: got %v, want ErrDecrypt", err)
	}
	forged := got
	forged.HubSender = externalSender(t, r.second)
	if _, err := forged.Open(room, private); !errors.Is(err, mls.ErrSignature) {
		t.Errorf("another hub: got %v, want ErrSignature", err)
	}
	refused := GroupInfoResponse{Room: room, Code: GroupInfoNotAuthorized}
	if _, err := refused.Open(room, private); err == nil {
		t.Error("a refusal is opened")
	}
}

// BenchmarkFrank is what a frank costs its hub and each receiver: an HMAC and a signature.
func BenchmarkFrank(b *testing.B) {
	suite := mls.X25519_AES128GCM_SHA256_Ed25519
	agent, err := suite.GenerateSignatureKey(rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	public, err := suite.SignaturePublicKey(agent.Public())
	if err != nil {
		b.Fatal(err)
	}
	hubKey, tag := make([]byte, 32), FrankAAD{}
	context := ServerFrankingContext{Sender: user("bob"), Room: "mimi://a.example/r/room", AcceptedTimestamp: 12}
	var f *Frank
	b.Run("hub", func(b *testing.B) {
		for b.Loop() {
			if f, err = NewFrank(rand.Reader, suite, agent, hubKey, tag, context); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("receiver", func(b *testing.B) {
		for b.Loop() {
			if err := f.Verify(suite, public, context); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func TestFranksVerifyForTheirMessageOnly(t *testing.T) {
	agent := newSigner(t)
	key := externalSender(t, agent).SignatureKey
	hubKey := []byte("a key that only the hub knows")
	tag := FrankingTag([]byte("salt"), []byte("content"))
	context := ServerFrankingContext{Sender: user("bob"), Room: "mimi://a.example/r/room", AcceptedTimestamp: 12}
	f, err := NewFrank(rand.Reader, suite, agent, hubKey, tag, context)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Verify(suite, key, context); err != nil {
		t.Error(err)
	}
	if err := f.VerifyReported(hubKey, tag, context); err != nil {
		t.Error(err)
	}
	later := context
	later.AcceptedTimestamp++
	for name, err := range map[string]error{
		"time":        f.Verify(suite, key, later),
		"suite":       f.Verify(mls.P256_AES128GCM_SHA256_P256, key, context),
		"key":         f.Verify(suite, externalSender(t, newSigner(t)).SignatureKey, context),
		"report":      f.VerifyReported(hubKey, tag, later),
		"report key":  f.VerifyReported([]byte("another"), tag, context),
		"report text": f.VerifyReported(hubKey, FrankingTag([]byte("salt"), []byte("other")), context),
	} {
		if !errors.Is(err, ErrFrank) {
			t.Errorf("another %s: got %v, want ErrFrank", name, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	kind := func(v wire) uint8 {
		for i, d := range decoders {
			if reflect.TypeOf(d()) == reflect.TypeOf(v) {
				return uint8(i)
			}
		}
		f.Fatalf("no decoder of %T", v)
		return 0
	}
	for _, c := range golden {
		f.Add(kind(c.value), unhex(f, c.hex))
	}
	for _, s := range samples(f) {
		f.Add(kind(s), codec.Marshal(s))
	}
	f.Fuzz(func(t *testing.T, kind uint8, b []byte) {
		v := decoders[int(kind)%len(decoders)]()
		if codec.Unmarshal(b, v) != nil {
			return
		}
		if again := codec.Marshal(v); !bytes.Equal(again, b) {
			t.Fatalf("%T: %x encodes to %x", v, b, again)
		}
	})
}

func FuzzSplitFanout(f *testing.F) {
	for _, s := range samples(f) {
		if m, ok := s.(*FanoutMessage); ok {
			b := codec.Marshal(m)
			f.Add(append(slices.Clone(b), b...))
		}
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		list, err := SplitFanout(body, 64)
		if err == nil && !bytes.Equal(bytes.Join(list, nil), body) {
			t.Fatal("the parts aren't the body")
		}
	})
}
