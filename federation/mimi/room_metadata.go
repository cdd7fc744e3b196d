package mimi

import (
	"fmt"
	"net/url"

	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
)

// MaxRoomDescriptions is the largest number of descriptions in a room's metadata.
const MaxRoomDescriptions = 64

// RichDescription is a description of a room in one language and media type.
//
//	struct {
//	    opaque media_type<V>;
//	    opaque language_tag<V>;
//	    opaque description_content<V>;
//	} RichDescription;
type RichDescription struct {
	MediaType   string // empty: text/plain;charset=utf-8
	LanguageTag string
	Content     []byte
}

// RoomMetadata is the room_metadata component of a room's GroupContext, and its update: what is shown of the room
// (draft-ietf-mimi-protocol-06, Section 7.6). Texts are UTF-8 without nulls. URIs are empty or absolute; that of the
// avatar has the scheme https.
//
//	struct {
//	    Uri room_uri;
//	    UTF8String room_name;
//	    RichDescription room_descriptions<V>;
//	    Uri room_avatar;
//	    UTF8String room_subject;
//	    UTF8String room_mood;
//	} RoomMetaData;
type RoomMetadata struct {
	RoomURI      string
	RoomName     string
	Descriptions []RichDescription
	Avatar       string
	Subject      string
	Mood         string
}

// MarshalMLS implements codec.Marshaler.
func (m RoomMetadata) MarshalMLS(w *codec.Writer) {
	w.Opaque([]byte(m.RoomURI))
	w.Opaque([]byte(m.RoomName))
	codec.WriteVector(w, m.Descriptions, func(w *codec.Writer, d RichDescription) {
		w.Opaque([]byte(d.MediaType))
		w.Opaque([]byte(d.LanguageTag))
		w.Opaque(d.Content)
	})
	w.Opaque([]byte(m.Avatar))
	w.Opaque([]byte(m.Subject))
	w.Opaque([]byte(m.Mood))
}

// UnmarshalMLS implements codec.Unmarshaler.
func (m *RoomMetadata) UnmarshalMLS(r *codec.Reader) {
	*m = RoomMetadata{RoomURI: readText(r, MaxText), RoomName: readText(r, MaxText)}
	n := 0
	m.Descriptions = codec.ReadVector(r, func(r *codec.Reader) RichDescription {
		if n++; n > MaxRoomDescriptions {
			r.Failf("more than %d descriptions", MaxRoomDescriptions)
		}
		return RichDescription{MediaType: readText(r, 255), LanguageTag: readText(r, 255), Content: r.OpaqueMax(MaxText)}
	})
	m.Avatar, m.Subject, m.Mood = readText(r, MaxText), readText(r, MaxText), readText(r, MaxText)
	if r.Err() != nil {
		return
	}
	if err := m.check(); err != nil {
		r.Fail(fmt.Errorf("%w: %w", codec.ErrValue, err))
	}
}

func (m *RoomMetadata) check() error {
	if m.RoomURI != "" {
		if u, err := url.Parse(m.RoomURI); err != nil || !u.IsAbs() {
			return fmt.Errorf("mimi: room metadata: %q is no URI", m.RoomURI)
		}
	}
	if m.Avatar != "" {
		if u, err := url.Parse(m.Avatar); err != nil || u.Scheme != "https" || u.Host == "" {
			return fmt.Errorf("mimi: room metadata: avatar %q is no https URI", m.Avatar)
		}
	}
	return nil
}

// MetadataOf returns the metadata of a room with that app_data_dictionary; empty ones if it has none.
func MetadataOf(d mls.AppDataDictionary) (m RoomMetadata, err error) {
	_, err = policyOf(d, ComponentRoomMetadata, &m)
	return m, err
}

type metadataComponent struct{}

// Update implements mls.Component. The update replaces the data; there may be one per commit.
func (metadataComponent) Update(_ []byte, updates [][]byte) ([]byte, error) {
	if len(updates) != 1 {
		return nil, fmt.Errorf("mimi: %d updates of the room's metadata in one commit", len(updates))
	}
	var m RoomMetadata
	if err := codec.Unmarshal(updates[0], &m); err != nil {
		return nil, fmt.Errorf("mimi: room metadata update: %w", err)
	}
	return updates[0], nil
}
