package client

import (
	"context"
	"fmt"

	"github.com/parley-mls/parley/node/api"
)

// RegisterPush has the node send an empty request to a UnifiedPush endpoint, an https URL, when a message waits and this
// client isn't connected; none any more if it is empty. The endpoint lasts until the next call, also over restarts.
func (c *Client) RegisterPush(ctx context.Context, endpoint string) error {
	if _, err := call(ctx, c.session, c.session.service.RegisterPush, &api.RegisterPushRequest{Endpoint: endpoint}); err != nil {
		return fmt.Errorf("client: register a push endpoint: %w", err)
	}
	return nil
}
