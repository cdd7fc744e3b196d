package authority

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/parley-mls/parley/federation/mimi"
)

// The admin protocol is JSON over HTTP on a unix socket of mode 0600: POST /authority/<method> with an adminRequest,
// answered by an adminResponse. Who may open the socket is the administrator.
const (
	adminPath       = "/authority/"
	maxAdminRequest = 64 << 10
)

// adminRequest has the arguments of every method; []byte is base64.
type adminRequest struct {
	User   mimi.URI      `json:"user,omitempty"`
	TTL    time.Duration `json:"ttl,omitempty"` // nanoseconds
	Token  string        `json:"token,omitempty"`
	CSR    []byte        `json:"csr,omitempty"`
	Chain  [][]byte      `json:"chain,omitempty"`
	Name   string        `json:"name,omitempty"`
	Reason string        `json:"reason,omitempty"`
	Filter *Filter       `json:"filter,omitempty"`
	Key    []byte        `json:"key,omitempty"` // SubjectPublicKeyInfo
}

// adminResponse has the results of every method, or an error.
type adminResponse struct {
	Domain       string          `json:"domain,omitempty"`
	Invitation   *Invitation     `json:"invitation,omitempty"`
	Chain        [][]byte        `json:"chain,omitempty"`
	Certificate  *Certificate    `json:"certificate,omitempty"`
	Certificates []Certificate   `json:"certificates,omitempty"`
	Bundle       json.RawMessage `json:"bundle,omitempty"`
	Code         string          `json:"code,omitempty"`
	Error        string          `json:"error,omitempty"`
}

// AdminHandler serves s to DialAdmin. Its paths begin with /authority/.
func AdminHandler(s Service) http.Handler {
	mux := http.NewServeMux()
	handle := func(method string, fn func(*http.Request, *adminRequest, *adminResponse) error) {
		mux.HandleFunc("POST "+adminPath+method, func(w http.ResponseWriter, r *http.Request) {
			var req adminRequest
			var resp adminResponse
			err := readJSON(w, r, &req)
			if err == nil {
				err = fn(r, &req, &resp)
			}
			status := http.StatusOK
			if err != nil {
				resp = adminResponse{Code: Code(err), Error: err.Error()}
				status = http.StatusUnprocessableEntity
				if resp.Code == "" {
					status = http.StatusInternalServerError
				}
			}
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(status)
			json.NewEncoder(w).Encode(resp)
		})
	}
	handle("domain", func(_ *http.Request, _ *adminRequest, resp *adminResponse) error {
		resp.Domain = s.Domain()
		return nil
	})
	handle("invite", func(r *http.Request, req *adminRequest, resp *adminResponse) error {
		i, err := s.Invite(r.Context(), req.User, req.TTL)
		resp.Invitation = &i
		return err
	})
	handle("enrol", func(r *http.Request, req *adminRequest, resp *adminResponse) (err error) {
		resp.Chain, err = s.Enrol(r.Context(), req.Token, req.CSR)
		return err
	})
	handle("issue", func(r *http.Request, req *adminRequest, resp *adminResponse) (err error) {
		resp.Chain, err = s.Issue(r.Context(), req.CSR)
		return err
	})
	handle("renew", func(r *http.Request, req *adminRequest, resp *adminResponse) (err error) {
		resp.Chain, err = s.Renew(r.Context(), req.Chain, req.CSR)
		return err
	})
	handle("revoke", func(r *http.Request, req *adminRequest, resp *adminResponse) (err error) {
		resp.Certificate, err = s.Revoke(r.Context(), req.Name, req.Reason)
		return err
	})
	handle("list", func(r *http.Request, req *adminRequest, resp *adminResponse) (err error) {
		var f Filter
		if req.Filter != nil {
			f = *req.Filter
		}
		resp.Certificates, err = s.List(r.Context(), f)
		return err
	})
	handle("bundle", func(r *http.Request, _ *adminRequest, resp *adminResponse) error {
		b, err := s.Bundle(r.Context())
		if err == nil {
			resp.Bundle = b.JSON()
		}
		return err
	})
	handle("issueNode", func(r *http.Request, req *adminRequest, resp *adminResponse) error {
		pub, err := parsePublicKey(req.Key)
		if err != nil {
			return fmt.Errorf("%w: key: %w", ErrRequest, err)
		}
		resp.Chain, err = s.IssueNode(r.Context(), pub)
		return err
	})
	handle("issueHub", func(r *http.Request, req *adminRequest, resp *adminResponse) error {
		pub, err := parsePublicKey(req.Key)
		if err != nil {
			return fmt.Errorf("%w: key: %w", ErrRequest, err)
		}
		resp.Chain, err = s.IssueHub(r.Context(), pub)
		return err
	})
	return mux
}

func readJSON(w http.ResponseWriter, r *http.Request, v any) error {
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxAdminRequest))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("%w: %w", ErrRequest, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: trailing bytes", ErrRequest)
	}
	return nil
}
