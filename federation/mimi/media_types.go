package mimi

import "github.com/parley-mls/parley/mls"

// ContentType is the media type of the messages of package content in an mls.ApplicationFraming.
func ContentType() mls.MediaType { return mls.MediaType{Type: "application/mimi-content"} }

// MediaTypes are those that a client has to read (draft-ietf-mimi-content, "MIMI Required and Recommended media types").
func MediaTypes() mls.MediaTypeList {
	return mls.MediaTypeList{
		ContentType(),
		{Type: "text/plain", Parameters: []mls.MediaParameter{{Name: "charset", Value: "utf-8"}}},
		{Type: "text/markdown", Parameters: []mls.MediaParameter{{Name: "variant", Value: "GFM-MIMI"}}},
	}
}
