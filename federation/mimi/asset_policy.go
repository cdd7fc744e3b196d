package mimi

import (
	"slices"
	"strings"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// AssetLocation is where the assets of a room are uploaded to.
type AssetLocation uint8

// The values of draft-ietf-mimi-room-policy-03, Section 6.4.
const (
	AssetsAnywhere AssetLocation = 0
	AssetsLocal    AssetLocation = 1 // to the uploader's provider
	AssetsAtHub    AssetLocation = 2
)

// DownloadType is a way in which assets are fetched.
type DownloadType uint8

// The values of draft-ietf-mimi-room-policy-03, Section 6.4.
const (
	DownloadDirect    DownloadType = 0
	DownloadHubProxy  DownloadType = 1
	DownloadOblivious DownloadType = 2
)

// UploadDomains are the hosts that have the assets of a provider's users.
type UploadDomains struct {
	Provider string
	Hosts    []string
}

// AssetPolicy is the asset_policy component: which assets messages may have, where they are, and how they are fetched (
// draft-ietf-mimi-room-policy-03, Section 6.4). The draft's permitted_media_types is optional, as its text has it, and a
// vector.
//
//	struct {
//	    AssetUploadLocation asset_upload_location;
//	    ProviderAssetUploadDomains upload_domains<V>;
//	    DownloadPrivacy download_privacy;
//	    uint64 max_image;
//	    uint64 max_audio;
//	    uint64 max_video;
//	    uint64 max_attachment;
//	    MediaType forbidden_media_types<V>;
//	    optional<MediaType permitted_media_types<V>>;
//	} AssetPolicy;
type AssetPolicy struct {
	Location                       AssetLocation
	Domains                        []UploadDomains // of AssetsAtHub that of the hub, and no other
	Allowed, ForbiddenDownloads    []DownloadType  // no allowed ones: all that aren't forbidden
	Default                        DownloadType
	MaxImage, MaxAudio             uint64 // bytes
	MaxVideo, MaxAttachment        uint64
	ForbiddenMedia, PermittedMedia mls.MediaTypeList // parameters don't matter; no permitted ones: all that aren't forbidden
}

const (
	maxUploadDomains = 1024 // providers of a room, and hosts of one
	maxDownloadTypes = 16
	maxMediaTypes    = 256
)

// MarshalMLS implements codec.Marshaler.
func (p AssetPolicy) MarshalMLS(w *codec.Writer) {
	w.Uint8(uint8(p.Location))
	codec.WriteVector(w, p.Domains, func(w *codec.Writer, d UploadDomains) {
		w.Opaque([]byte(d.Provider))
		codec.WriteVector(w, d.Hosts, func(w *codec.Writer, h string) { w.Opaque([]byte(h)) })
	})
	for _, list := range [][]DownloadType{p.Allowed, p.ForbiddenDownloads} {
		codec.WriteVector(w, list, func(w *codec.Writer, t DownloadType) { w.Uint8(uint8(t)) })
	}
	w.Uint8(uint8(p.Default))
	for _, n := range []uint64{p.MaxImage, p.MaxAudio, p.MaxVideo, p.MaxAttachment} {
		w.Uint64(n)
	}
	p.ForbiddenMedia.MarshalMLS(w)
	w.Optional(p.PermittedMedia != nil)
	if p.PermittedMedia != nil {
		p.PermittedMedia.MarshalMLS(w)
	}
}

// UnmarshalMLS implements codec.Unmarshaler. What contradicts itself is refused: a default that isn't allowed, a provider
// twice, a hub's location without exactly one provider.
func (p *AssetPolicy) UnmarshalMLS(r *codec.Reader) {
	*p = AssetPolicy{Location: AssetLocation(r.Uint8())}
	seen := make(map[string]bool)
	p.Domains = readAtMost(r, maxUploadDomains, func(r *codec.Reader) UploadDomains {
		d := UploadDomains{Provider: readDomain(r), Hosts: readAtMost(r, maxUploadDomains, readDomain)}
		if seen[d.Provider] {
			r.Failf("upload domains of %s twice", d.Provider)
		}
		seen[d.Provider] = true
		return d
	})
	readTypes := func() []DownloadType {
		return readAtMost(r, maxDownloadTypes, func(r *codec.Reader) DownloadType { return DownloadType(r.Uint8()) })
	}
	p.Allowed, p.ForbiddenDownloads, p.Default = readTypes(), readTypes(), DownloadType(r.Uint8())
	p.MaxImage, p.MaxAudio, p.MaxVideo, p.MaxAttachment = r.Uint64(), r.Uint64(), r.Uint64(), r.Uint64()
	readMedia := func(r *codec.Reader) (m mls.MediaType) { m.UnmarshalMLS(r); return m }
	p.ForbiddenMedia = readAtMost(r, maxMediaTypes, readMedia)
	if r.Optional() {
		if p.PermittedMedia = readAtMost(r, maxMediaTypes, readMedia); len(p.PermittedMedia) == 0 {
			r.Failf("a list of permitted media types with none")
		}
	}
	if r.Err() == nil && (p.Location > AssetsAtHub || p.Location == AssetsAtHub && len(p.Domains) != 1 || !p.Downloads(p.Default)) {
		r.Failf("asset location %d with %d providers and download type %d", p.Location, len(p.Domains), p.Default)
	}
}

func readDomain(r *codec.Reader) string {
	s := string(r.OpaqueMax(MaxDomain))
	if r.Err() == nil && ValidDomain(s) != nil {
		r.Failf("%q isn't a domain", s)
	}
	return s
}

// Downloads says whether assets may be fetched in a way.
func (p *AssetPolicy) Downloads(t DownloadType) bool {
	return !slices.Contains(p.ForbiddenDownloads, t) && (len(p.Allowed) == 0 || slices.Contains(p.Allowed, t))
}

// checkHub says whether the assets that are at the hub are at the hub of the room.
func (p *AssetPolicy) checkHub(room URI) error {
	if p.Location == AssetsAtHub && p.Domains[0].Provider != room.Domain() {
		return forbidden("assets are uploaded to %s, which isn't the hub of %s", p.Domains[0].Provider, room)
	}
	return nil
}

// AssetPolicyOf returns the asset policy of a room with that app_data_dictionary, nil if it has none.
func AssetPolicyOf(d mls.AppDataDictionary) (*AssetPolicy, error) {
	p := new(AssetPolicy)
	have, err := policyOf(d, ComponentAssets, p)
	if err != nil || !have {
		return nil, err
	}
	return p, nil
}

// Asset is what a message says of an asset.
type Asset struct {
	Sender     URI    // of the message
	Host       string // of the asset's URL
	MediaType  string // parameters don't matter
	Attachment bool   // by its disposition, or else it is shown
	Size       uint64 // bytes; 0 if it isn't said
}

// CheckUpload says whether a user may send a message with an asset to a room with that app_data_dictionary: by the
// capabilities of the sender's role, and the room's asset policy. Errors are *PolicyError.
func CheckUpload(d mls.AppDataDictionary, a Asset) error {
	return checkAsset(d, a, a.Sender, [4]Capability{CanUploadImage, CanUploadAudio, CanUploadVideo, CanUploadAttachment})
}

// CheckDownload says whether a user may fetch an asset that a message in the room has, like CheckUpload: that the asset
// is where the policy has those of the sender's provider is what keeps a message from leading anywhere.
func CheckDownload(d mls.AppDataDictionary, a Asset, user URI) error {
	return checkAsset(d, a, user, [4]Capability{CanDownloadImage, CanDownloadAudio, CanDownloadVideo, CanDownloadAttachment})
}

// checkAsset checks an asset for a user; needs are the capabilities for images, audio, video and attachments. What is
// shown and none of these counts as an attachment.
func checkAsset(d mls.AppDataDictionary, a Asset, user URI, needs [4]Capability) error {
	media, _, _ := strings.Cut(a.MediaType, ";")
	media = strings.ToLower(strings.TrimSpace(media))
	top, _, _ := strings.Cut(media, "/")
	kind := slices.Index([]string{"image", "audio", "video"}, top)
	if kind < 0 || a.Attachment {
		kind = 3
	}
	role, err := RoleOf(d, user)
	if err != nil {
		return forbidden("%v", err)
	}
	if !role.May(needs[kind]) {
		return forbidden("%s has assets of type %q, and needs %v", user, media, needs[kind])
	}
	p, err := AssetPolicyOf(d)
	if err != nil {
		return forbidden("%v", err)
	}
	if p == nil {
		return nil
	}
	is := func(m mls.MediaType) bool { return strings.EqualFold(m.Type, media) }
	most := [4]uint64{p.MaxImage, p.MaxAudio, p.MaxVideo, p.MaxAttachment}[kind]
	switch {
	case slices.ContainsFunc(p.ForbiddenMedia, is), p.PermittedMedia != nil && !slices.ContainsFunc(p.PermittedMedia, is):
		return forbidden("assets of type %q", media)
	case a.Size == 0 || a.Size > most:
		return forbidden("an asset of %d bytes, 1 to %d of its kind", a.Size, most)
	case !p.has(a.Sender, a.Host):
		return forbidden("an asset of %s at %q", a.Sender, a.Host)
	}
	return nil
}

// has says whether a host has the assets of a user.
func (p *AssetPolicy) has(user URI, host string) bool {
	return p.Location == AssetsAnywhere || slices.ContainsFunc(p.Domains, func(d UploadDomains) bool {
		return (p.Location == AssetsAtHub || d.Provider == user.Domain()) && slices.Contains(d.Hosts, host)
	})
}
