package mimi

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"strings"
)

// DirectoryPath is where a provider's directory document is (draft-ietf-mimi-protocol-06, Section 5.1).
const DirectoryPath = "/.well-known/mimi-protocol-directory"

// MaxDirectory is the largest size in bytes of a directory document.
const MaxDirectory = 16 << 10

// Directory tells the addresses of a provider's endpoints: https URLs with a variable in braces, which Expand
// replaces. An endpoint that the provider doesn't have is empty.
type Directory struct {
	KeyMaterial     string `json:"keyMaterial,omitempty"`     // {targetUser}
	Update          string `json:"update,omitempty"`          // {roomId}
	Notify          string `json:"notify,omitempty"`          // {roomId}
	SubmitMessage   string `json:"submitMessage,omitempty"`   // {roomId}
	GroupInfo       string `json:"groupInfo,omitempty"`       // {roomId}
	RequestConsent  string `json:"requestConsent,omitempty"`  // {targetUser}
	UpdateConsent   string `json:"updateConsent,omitempty"`   // {requesterUser}
	IdentifierQuery string `json:"identifierQuery,omitempty"` // {domain}
	ReportAbuse     string `json:"reportAbuse,omitempty"`     // {roomId}
	ProxyDownload   string `json:"proxyDownload,omitempty"`   // {downloadUrl}
}

// NewDirectory is the directory of a node of Parley at a domain: the endpoints that it has.
func NewDirectory(domain string) *Directory {
	base := "https://" + domain + "/mimi/v1/"
	return &Directory{
		KeyMaterial: base + "keyMaterial/{targetUser}", Update: base + "update/{roomId}", Notify: base + "notify/{roomId}",
		SubmitMessage: base + "submitMessage/{roomId}", GroupInfo: base + "groupInfo/{roomId}",
		IdentifierQuery: base + "identifierQuery/{domain}", ReportAbuse: base + "reportAbuse/{roomId}",
		RequestConsent: base + "requestConsent/{targetUser}", UpdateConsent: base + "updateConsent/{requesterUser}",
		ProxyDownload: base + "proxyDownload/{downloadUrl}",
	}
}

// ParseDirectory reads the directory of the provider at domain. Its URLs have the scheme https, exactly one variable,
// and the provider's domain as host: what is sent to a provider goes to nobody else. A port is allowed. Members that
// aren't known are ignored, as the draft's registry may grow.
func ParseDirectory(domain string, doc []byte) (*Directory, error) {
	if len(doc) > MaxDirectory {
		return nil, fmt.Errorf("mimi: directory of %s: %d bytes, at most %d", domain, len(doc), MaxDirectory)
	}
	d := new(Directory)
	dec := json.NewDecoder(bytes.NewReader(doc))
	if err := dec.Decode(d); err != nil {
		return nil, fmt.Errorf("mimi: directory of %s: %w", domain, err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, fmt.Errorf("mimi: directory of %s: more than one document", domain)
	}
	for _, t := range []string{d.KeyMaterial, d.Update, d.Notify, d.SubmitMessage, d.GroupInfo, d.RequestConsent, d.UpdateConsent, d.IdentifierQuery, d.ReportAbuse, d.ProxyDownload} {
		if t == "" {
			continue
		}
		if err := checkTemplate(domain, t); err != nil {
			return nil, fmt.Errorf("mimi: directory of %s: %w", domain, err)
		}
	}
	return d, nil
}

func checkTemplate(domain, template string) error {
	open, end := strings.IndexByte(template, '{'), strings.IndexByte(template, '}')
	if open < 0 || end < open || strings.Count(template, "{") != 1 || strings.Count(template, "}") != 1 {
		return fmt.Errorf("%q has not exactly one variable", template)
	}
	u, err := url.Parse(template[:open] + "x" + template[end+1:])
	if err != nil {
		return fmt.Errorf("%q: %w", template, err)
	}
	if u.Scheme != "https" || u.User != nil || u.Fragment != "" || u.RawQuery != "" {
		return fmt.Errorf("%q isn't a plain https URL", template)
	}
	if u.Hostname() != domain || !strings.HasPrefix(template[:open], "https://"+u.Host+"/") {
		return fmt.Errorf("%q isn't at %s", template, domain)
	}
	return nil
}

// ErrNoEndpoint: a provider's directory doesn't have the endpoint.
var ErrNoEndpoint = errors.New("mimi: the provider has no such endpoint")

// Expand puts a value for the variable of a URL template. All but letters, digits and "-._~" are percent-encoded (RFC
// 6570, Section 3.2.2). It fails with ErrNoEndpoint for an empty template.
func Expand(template, value string) (string, error) {
	open, end := strings.IndexByte(template, '{'), strings.IndexByte(template, '}')
	if open < 0 || end < open {
		return "", ErrNoEndpoint
	}
	return template[:open] + escape(value) + template[end+1:], nil
}

func escape(s string) string {
	const hex = "0123456789ABCDEF"
	var b strings.Builder
	for _, c := range []byte(s) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '.', c == '_', c == '~':
			b.WriteByte(c)
		default:
			b.Write([]byte{'%', hex[c>>4], hex[c&15]})
		}
	}
	return b.String()
}
