package federation

import (
	"context"
	"net/http"
	"strconv"

	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/federation/ohttp"
	"github.com/parley-mls/parley/mls"
)

// A hub is an oblivious gateway for the clients of its peers, and their nodes are the relays (
// draft-ietf-mimi-protocol-06, Section 5.10.3). The draft doesn't say where a gateway is and has its keys; here it is where
// RFC 9540 lets clients look for it.

// GatewayPath is where a hub takes encapsulated requests (POST) and has the keys for them (GET).
const GatewayPath = "/.well-known/ohttp-gateway"

// GatewayKeysPath, followed by the number of a cipher suite, is where a node has these keys signed as it signs in rooms of
// that suite (GET): a mimi.GatewayKeys.
const GatewayKeysPath = "/parley/v1/gateway-keys/"

func (c *call) getGateway() (*answer, error) {
	keys, err := c.h.provider.GatewayKeys(0)
	if err != nil {
		return nil, err
	}
	return &answer{status: http.StatusOK, contentType: ohttp.KeysType, body: keys.Keys}, nil
}

func (c *call) getGatewayKeys() (*answer, error) {
	suite, err := c.suite()
	if err != nil {
		return nil, err
	}
	keys, err := c.h.provider.GatewayKeys(suite)
	if err != nil {
		return nil, err
	}
	return encoded(keys, 0), nil
}

func (c *call) postGateway() (*answer, error) {
	return c.body(MaxOblivious, ohttp.RequestType, func(body []byte) (*answer, error) {
		response, err := c.h.provider.Oblivious(c.r.Context(), c.from, body)
		if err != nil {
			return nil, err
		}
		return &answer{status: http.StatusOK, contentType: ohttp.ResponseType, body: response}, nil
	})
}

// Oblivious relays a client's encapsulated request to a hub, and returns the encapsulated answer.
func (c *Client) Oblivious(ctx context.Context, hub string, request []byte) ([]byte, error) {
	body, _, err := c.do(ctx, hub, exchange{
		method: http.MethodPost, url: "https://" + hub + GatewayPath, contentType: ohttp.RequestType, body: request,
		want: http.StatusOK, max: MaxObliviousResponse,
	})
	return body, err
}

// GatewayKeys returns the keys of a hub's oblivious gateway, signed as in rooms of a suite. Nothing is verified.
func (c *Client) GatewayKeys(ctx context.Context, hub string, suite mls.CipherSuite) (*mimi.GatewayKeys, error) {
	body, _, err := c.do(ctx, hub, exchange{
		method: http.MethodGet, url: "https://" + hub + GatewayKeysPath + strconv.Itoa(int(suite)), want: http.StatusOK, max: maxAnswer,
	})
	if err != nil {
		return nil, err
	}
	keys := new(mimi.GatewayKeys)
	return keys, decodeAnswer(hub, body, keys)
}
