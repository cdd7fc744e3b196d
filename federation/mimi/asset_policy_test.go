package mimi

import (
	"strings"
	"testing"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

func TestAssetsAreWhatThePolicyAllows(t *testing.T) {
	rules := CooperativeRoom(testHub)
	silent := rules.Roles.Find(2)
	silent.Capabilities = append(silent.Capabilities[:0:0], CanSendMessage, CanUploadImage, CanDownloadAttachment)
	at := func(edit func(p *AssetPolicy)) mls.AppDataDictionary {
		r := rules
		if edit != nil {
			r.Assets = &AssetPolicy{
				Location: AssetsLocal, Domains: []UploadDomains{{"a.example", []string{"cdn.example", "a.example"}}, {"b.example", []string{"b.example"}}},
				MaxImage: 10, MaxAudio: 20, MaxVideo: 30, MaxAttachment: 40, ForbiddenMedia: mls.MediaTypeList{{Type: "image/tiff"}},
			}
			edit(r.Assets)
		}
		return ruled(r, [4]uint32{4, 2, 3, 2})
	}
	as := func(*AssetPolicy) {}
	image := Asset{Sender: user("carol"), Host: "a.example", MediaType: "Image/PNG; x=y", Size: 10}
	change := func(f func(a *Asset)) Asset { a := image; f(&a); return a }
	for _, c := range []struct {
		name   string
		policy func(*AssetPolicy)
		asset  Asset
		rule   string // "" if it is allowed
	}{
		{"an image", as, image, ""},
		{"an image at another host of the provider", as, change(func(a *Asset) { a.Host = "cdn.example" }), ""},
		{"an image at another provider", as, change(func(a *Asset) { a.Host = "b.example" }), "at \"b.example\""},
		{"an image on another port", as, change(func(a *Asset) { a.Host = "a.example:444" }), "at \"a.example:444\""},
		{"a large image", as, change(func(a *Asset) { a.Size = 11 }), "11 bytes, 1 to 10"},
		{"an image of unknown size", as, change(func(a *Asset) { a.Size = 0 }), "0 bytes"},
		{"a large image to be kept", as, change(func(a *Asset) { a.Size, a.Attachment = 40, true }), ""},
		{"a larger one", as, change(func(a *Asset) { a.Size, a.Attachment = 41, true }), "1 to 40"},
		{"audio", as, change(func(a *Asset) { a.MediaType, a.Size = "audio/ogg", 21 }), "1 to 20"},
		{"video", as, change(func(a *Asset) { a.MediaType, a.Size = "video/ogg", 31 }), "1 to 30"},
		{"text that is shown", as, change(func(a *Asset) { a.MediaType, a.Size = "text/html", 40 }), ""},
		{"a forbidden type", as, change(func(a *Asset) { a.MediaType = "image/TIFF" }), "type \"image/tiff\""},
		{"a type that isn't permitted", func(p *AssetPolicy) { p.PermittedMedia = mls.MediaTypeList{{Type: "image/gif"}} }, image, "type \"image/png\""},
		{"one that is", func(p *AssetPolicy) { p.PermittedMedia = mls.MediaTypeList{{Type: "image/png"}} }, image, ""},
		{"anywhere", func(p *AssetPolicy) { p.Location = AssetsAnywhere }, change(func(a *Asset) { a.Host = "x.example" }), ""},
		{"at the hub", func(p *AssetPolicy) { p.Location, p.Domains = AssetsAtHub, p.Domains[:1] }, change(func(a *Asset) { a.Sender = "mimi://c.example/u/x" }), "mimi://c.example/u/x has assets"},
		{"by a role without the capability", as, change(func(a *Asset) { a.Sender, a.Attachment = user("bob"), true }), "needs canUploadAttachment"},
		{"by a role with it", as, change(func(a *Asset) { a.Sender = user("bob") }), ""},
		{"by a stranger", as, change(func(a *Asset) { a.Sender = user("frank") }), "needs canUploadImage"},
		{"by the banned", as, change(func(a *Asset) { a.Sender = user("eve") }), "needs canUploadImage"},
		{"a large one without a policy", nil, change(func(a *Asset) { a.Size, a.Host = 1<<40, "x.example" }), ""},
		{"without a policy or capability", nil, change(func(a *Asset) { a.Sender, a.MediaType = user("bob"), "video/ogg" }), "needs canUploadVideo"},
	} {
		err := CheckUpload(at(c.policy), c.asset)
		if (err == nil) != (c.rule == "") || err != nil && !strings.Contains(err.Error(), c.rule) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if err := CheckDownload(at(as), image, user("bob")); err == nil || !strings.Contains(err.Error(), "needs canDownloadImage") {
		t.Errorf("an image for a role without the capability: %v", err)
	}
	kept := change(func(a *Asset) { a.Attachment = true })
	if err := CheckDownload(at(as), kept, user("bob")); err != nil {
		t.Errorf("an attachment for a role with it: %v", err)
	}
	kept.Host = "b.example"
	if err := CheckDownload(at(as), kept, user("bob")); err == nil {
		t.Error("an attachment from another provider than the sender's")
	}
}

func TestAssetPolicyIsTheRoomsOwn(t *testing.T) {
	update := func(p AssetPolicy) mls.Proposal { return appData(ComponentAssets, codec.Marshal(p)) }
	at := func(domain string) AssetPolicy {
		return AssetPolicy{Location: AssetsAtHub, Domains: []UploadDomains{{domain, []string{domain}}}}
	}
	rules := CooperativeRoom(testHub)
	admin := rules.Roles.Find(4)
	admin.Capabilities = append(admin.Capabilities[:len(admin.Capabilities):len(admin.Capabilities)], CanChangeOtherPolicyAttribute)
	played(t, rules, [4]uint32{4, 2, 3, 2}, []act{
		{"assets at the hub", commits("alice1", update(at("a.example"))), ""},
		{"assets at another hub", commits("alice1", update(at("b.example"))), "isn't the hub"},
		{"a user changes the policy", commits("bob1", update(at("a.example"))), "changes policy"},
	})
	rules.Assets = &AssetPolicy{Location: AssetsAtHub, Domains: []UploadDomains{{"b.example", nil}}}
	d := rules.Dictionary(RoomDictionary(ParticipantList{{user("alice"), 4}}, RoomMetadata{}))
	if err := CheckNewRoom(d, "mimi://a.example/r/room"); err == nil {
		t.Error("a new room has its assets at another hub")
	}
	if err := CheckNewRoom(d, "mimi://b.example/r/room"); err != nil {
		t.Error(err)
	}
}
