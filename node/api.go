package node

import (
	"context"
	"crypto/sha256"
	"io"
	"math"
	"net/http"
	"slices"
	"strings"

	"connectrpc.com/connect"

	"github.com/parley-mls/parley/federation"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/mls/codec"
	"github.com/parley-mls/parley/node/api"
	"github.com/parley-mls/parley/node/api/apiconnect"
	"github.com/parley-mls/parley/node/store"
)

// clientHandler serves the client API: Connect, gRPC and gRPC-Web.
func (n *Node) clientHandler() http.Handler {
	mux := http.NewServeMux()
	open, authenticated := gate{n, true}, gate{n, false}
	path, h := apiconnect.NewEnrolmentServiceHandler(enrolment{n}, connect.WithReadMaxBytes(maxEnrolment), connect.WithInterceptors(open))
	mux.Handle(path, open.before(maxEnrolment, h))
	path, h = apiconnect.NewClientServiceHandler(clientAPI{n}, connect.WithReadMaxBytes(n.cfg.Limits.RequestBytes), connect.WithInterceptors(authenticated))
	mux.Handle(path, authenticated.before(n.cfg.Limits.RequestBytes, h))
	return mux
}

// maxEnrolment is the size in bytes of the largest request without a token.
const maxEnrolment = 64 << 10

// enrolment implements apiconnect.EnrolmentServiceHandler.
type enrolment struct{ n *Node }

// Enrol exchanges an invitation for a credential.
func (e enrolment) Enrol(ctx context.Context, req *connect.Request[api.EnrolRequest]) (*connect.Response[api.EnrolResponse], error) {
	if err := e.n.disk.grow(); err != nil {
		return nil, err
	}
	chain, err := e.n.service.Enrol(ctx, req.Msg.Token, req.Msg.Csr)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&api.EnrolResponse{Chain: chain, Bundle: e.n.ownBundle.Load().JSON()}), nil
}

// Bundle returns the own provider's trust bundle.
func (e enrolment) Bundle(context.Context, *connect.Request[api.BundleRequest]) (*connect.Response[api.BundleResponse], error) {
	return connect.NewResponse(&api.BundleResponse{Bundle: e.n.ownBundle.Load().JSON()}), nil
}

// Challenge returns a nonce.
func (e enrolment) Challenge(context.Context, *connect.Request[api.ChallengeRequest]) (*connect.Response[api.ChallengeResponse], error) {
	nonce, err := e.n.auth.challenge()
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&api.ChallengeResponse{Nonce: nonce}), nil
}

// Authenticate exchanges a signed nonce for a token.
func (e enrolment) Authenticate(_ context.Context, req *connect.Request[api.AuthenticateRequest]) (*connect.Response[api.AuthenticateResponse], error) {
	token, s, err := e.n.auth.authenticate(req.Msg)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&api.AuthenticateResponse{
		Token: token, ExpiresUnix: s.expires.Unix(), Client: string(s.client), User: string(s.user),
	}), nil
}

// clientAPI implements apiconnect.ClientServiceHandler.
type clientAPI struct{ n *Node }

// Renew exchanges the credential that the client authenticated with for a new one.
func (a clientAPI) Renew(ctx context.Context, req *connect.Request[api.RenewRequest]) (*connect.Response[api.EnrolResponse], error) {
	if err := a.n.disk.grow(); err != nil {
		return nil, err
	}
	chain, err := a.n.service.Renew(ctx, sessionOf(ctx).chain, req.Msg.Csr)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&api.EnrolResponse{Chain: chain, Bundle: a.n.ownBundle.Load().JSON()}), nil
}

// DeleteClient deletes a client of the user.
func (a clientAPI) DeleteClient(ctx context.Context, req *connect.Request[api.DeleteClientRequest]) (*connect.Response[api.DeleteClientResponse], error) {
	if err := a.n.deleteClient(ctx, sessionOf(ctx).user, req.Msg.Client); err != nil {
		return nil, err
	}
	return connect.NewResponse(new(api.DeleteClientResponse)), nil
}

// Bundles returns the own trust bundle and those of the approved peers that are known.
func (a clientAPI) Bundles(context.Context, *connect.Request[api.BundlesRequest]) (*connect.Response[api.BundlesResponse], error) {
	resp := new(api.BundlesResponse)
	for _, b := range a.n.trust.Bundles() {
		resp.Bundles = append(resp.Bundles, b.JSON())
	}
	return connect.NewResponse(resp), nil
}

// PublishKeyPackages stores KeyPackages of the client.
func (a clientAPI) PublishKeyPackages(ctx context.Context, req *connect.Request[api.PublishKeyPackagesRequest]) (*connect.Response[api.PublishKeyPackagesResponse], error) {
	have, err := a.n.publish(sessionOf(ctx).submitter(), req.Msg.KeyPackages, req.Msg.Replace)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(a.n.published(have)), nil
}

func (n *Node) published(have published) *api.PublishKeyPackagesResponse {
	return &api.PublishKeyPackagesResponse{
		Available: uint32(have.count), LastResort: have.lastResort, MaxLifetime: uint64(maxLifetime(n.cfg.Limits.KeyPackageDays).Seconds()),
	}
}

// Query asks a provider for a user.
func (a clientAPI) Query(ctx context.Context, req *connect.Request[api.QueryRequest]) (*connect.Response[api.MimiResponse], error) {
	var query mimi.IdentifierRequest
	if err := decode(req.Msg.Body, &query); err != nil {
		return nil, err
	}
	if err := mimi.ValidDomain(req.Msg.Domain); err != nil {
		return nil, refuse("malformed", "%v", err)
	}
	user := sessionOf(ctx).user
	if wait := a.n.queryPace.Take(string(user), 1, slowly(a.n.cfg.Limits.Queries)); wait > 0 {
		return nil, busy(wait, "%s asks too many queries", user)
	}
	var resp *mimi.IdentifierResponse
	var err error
	if req.Msg.Domain == a.n.cfg.Domain {
		resp, err = a.n.identifierQuery(ctx, a.n.cfg.Domain, &query)
	} else {
		ctx, cancel := context.WithTimeout(ctx, proxyTimeout)
		defer cancel()
		if resp, err = a.n.federation.IdentifierQuery(ctx, req.Msg.Domain, &query); err != nil {
			err = a.n.unreachable(req.Msg.Domain, err)
		}
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&api.MimiResponse{Body: codec.Marshal(resp)}), nil
}

// SetProfile replaces the profile of the client's user.
func (a clientAPI) SetProfile(ctx context.Context, req *connect.Request[api.Profile]) (*connect.Response[api.SetProfileResponse], error) {
	p := &profileRecord{hidden: req.Msg.Hidden}
	for i, f := range req.Msg.Fields {
		if f.Source > 0xff || f.Search > searchPart {
			return nil, refuse("malformed", "field %d: source %d, searchable in the way %d", i, f.Source, f.Search)
		}
		p.fields = append(p.fields, profileField{mimi.FieldSource(f.Source), f.Name, f.Value, uint8(f.Search), f.Shown})
	}
	if err := a.n.setProfile(sessionOf(ctx).user, p); err != nil {
		return nil, err
	}
	return connect.NewResponse(new(api.SetProfileResponse)), nil
}

// GetProfile returns the profile of the client's user.
func (a clientAPI) GetProfile(ctx context.Context, _ *connect.Request[api.GetProfileRequest]) (*connect.Response[api.Profile], error) {
	p, err := a.n.profile(sessionOf(ctx).user)
	if err != nil {
		return nil, err
	}
	resp := &api.Profile{Hidden: p.hidden}
	for _, f := range p.fields {
		resp.Fields = append(resp.Fields, &api.ProfileField{Source: uint32(f.source), Name: f.name, Value: f.value, Search: uint32(f.search), Shown: f.shown})
	}
	return connect.NewResponse(resp), nil
}

// ClaimKeyPackages claims KeyPackages of a user through the room's hub.
func (a clientAPI) ClaimKeyPackages(ctx context.Context, req *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
	room, err := roomURI(req.Msg.Room)
	if err != nil {
		return nil, err
	}
	var claim mimi.KeyMaterialRequest
	if err := decode(req.Msg.Body, &claim); err != nil {
		return nil, err
	}
	if claim.Room != room || claim.RequestingUser != sessionOf(ctx).user {
		return nil, refuse("notAllowed", "the request is for another room or by another user")
	}
	ctx, cancel := context.WithTimeout(ctx, proxyTimeout)
	defer cancel()
	var resp *mimi.KeyMaterialResponse
	if room.Domain() == a.n.cfg.Domain {
		resp, err = a.n.keyMaterial(ctx, a.n.cfg.Domain, &claim)
	} else if resp, err = a.n.federation.KeyMaterial(ctx, room.Domain(), &claim); err != nil {
		err = a.n.unreachable(room.Domain(), err)
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&api.MimiResponse{Body: codec.Marshal(resp)}), nil
}

// HubSender returns this hub's entry for external_senders.
func (a clientAPI) HubSender(_ context.Context, req *connect.Request[api.HubSenderRequest]) (*connect.Response[api.HubSenderResponse], error) {
	suite := mls.CipherSuite(req.Msg.CipherSuite)
	if req.Msg.CipherSuite > 0xffff || !slices.Contains(a.n.cfg.Suites, suite) {
		return nil, refuse("notAllowed", "this node doesn't host rooms of cipher suite %d", req.Msg.CipherSuite)
	}
	_, sender, err := a.n.keys.hub(suite)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&api.HubSenderResponse{ExternalSender: codec.Marshal(sender)}), nil
}

// CreateRoom makes this node the hub of the client's new group.
func (a clientAPI) CreateRoom(ctx context.Context, req *connect.Request[api.CreateRoomRequest]) (*connect.Response[api.CreateRoomResponse], error) {
	room, err := roomURI(req.Msg.Room)
	if err != nil {
		return nil, err
	}
	var info mls.GroupInfo
	if err := decode(req.Msg.GroupInfo, &info); err != nil {
		return nil, err
	}
	var tree mimi.RatchetTreeOption
	if err := decode(req.Msg.RatchetTree, &tree); err != nil {
		return nil, err
	}
	if tree.Tree == nil {
		return nil, refuse("malformed", "a new room comes with its whole ratchet tree")
	}
	if err := a.n.createRoom(sessionOf(ctx).submitter(), room, &info, tree.Tree); err != nil {
		return nil, err
	}
	return connect.NewResponse(new(api.CreateRoomResponse)), nil
}

// Rooms lists the rooms of the client's user.
func (a clientAPI) Rooms(ctx context.Context, _ *connect.Request[api.RoomsRequest]) (*connect.Response[api.RoomsResponse], error) {
	s := sessionOf(ctx)
	members, err := a.n.members(s.client)
	if err != nil {
		return nil, err
	}
	uris := make(map[mimi.URI]bool)
	for uri := range members {
		uris[uri] = true
	}
	if err := store.ScanPrefix(a.n.store, key(prefixUserRoom, s.user), func(k, _ []byte) bool {
		uris[mimi.URI(k)] = true
		return true
	}); err != nil {
		return nil, err
	}
	resp := new(api.RoomsResponse)
	for uri := range uris {
		r, err := a.n.openRoom(uri)
		if err != nil {
			return nil, err
		}
		room := &api.Room{Room: string(uri)}
		if r != nil {
			room.LastSeq = r.durable.Load()
		}
		m, ok := members[uri]
		room.Joined = ok && m.end == 0
		resp.Rooms = append(resp.Rooms, room)
	}
	slices.SortFunc(resp.Rooms, func(a, b *api.Room) int { return strings.Compare(a.Room, b.Room) })
	return connect.NewResponse(resp), nil
}

// Update submits a handshake to the room's hub.
func (a clientAPI) Update(ctx context.Context, req *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
	room, err := roomURI(req.Msg.Room)
	if err != nil {
		return nil, err
	}
	by := sessionOf(ctx).submitter()
	var resp *mimi.UpdateRoomResponse
	var seq uint64
	if room.Domain() == a.n.cfg.Domain {
		resp, seq, err = a.n.update(by, room, req.Msg.Body)
	} else {
		resp, seq, err = a.n.proxyUpdate(ctx, by, room, req.Msg.Body)
	}
	if err != nil {
		return nil, err
	}
	answer := &api.MimiResponse{Body: codec.Marshal(resp), Seq: seq}
	if resp.Code == mimi.UpdateSuccess || resp.Code == mimi.UpdateWrongEpoch {
		answer.Head = a.n.lastHead(room)
	}
	return connect.NewResponse(answer), nil
}

// SubmitMessage submits an application message to the room's hub.
func (a clientAPI) SubmitMessage(ctx context.Context, req *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
	room, err := roomURI(req.Msg.Room)
	if err != nil {
		return nil, err
	}
	by := sessionOf(ctx).submitter()
	by.generation = req.Msg.Generation
	var resp *mimi.SubmitMessageResponse
	var seq uint64
	if room.Domain() == a.n.cfg.Domain {
		resp, seq, err = a.n.submitMessage(by, room, req.Msg.Body)
	} else {
		resp, seq, err = a.n.proxyMessage(ctx, by, room, req.Msg.Body)
	}
	if err != nil {
		return nil, err
	}
	answer := &api.MimiResponse{Body: codec.Marshal(resp), Seq: seq}
	if resp.Code == mimi.SubmitAccepted || resp.Code == mimi.SubmitEpochTooOld {
		answer.Head = a.n.lastHead(room)
	}
	return connect.NewResponse(answer), nil
}

// SendEphemeral passes a message on to who is connected.
func (a clientAPI) SendEphemeral(ctx context.Context, req *connect.Request[api.MimiRequest]) (*connect.Response[api.SendEphemeralResponse], error) {
	room, err := roomURI(req.Msg.Room)
	if err != nil {
		return nil, err
	}
	by := sessionOf(ctx).submitter()
	by.generation = req.Msg.Generation
	if err := a.n.sendEphemeral(ctx, by, room, req.Msg.Body); err != nil {
		return nil, err
	}
	return connect.NewResponse(new(api.SendEphemeralResponse)), nil
}

// RegisterPush has the client woken while it isn't connected.
func (a clientAPI) RegisterPush(ctx context.Context, req *connect.Request[api.RegisterPushRequest]) (*connect.Response[api.RegisterPushResponse], error) {
	if err := a.n.registerPush(sessionOf(ctx).client, req.Msg.Endpoint); err != nil {
		return nil, err
	}
	return connect.NewResponse(new(api.RegisterPushResponse)), nil
}

// ReportAbuse reports abuse to the room's hub.
func (a clientAPI) ReportAbuse(ctx context.Context, req *connect.Request[api.MimiRequest]) (*connect.Response[api.ReportAbuseResponse], error) {
	room, err := roomURI(req.Msg.Room)
	if err != nil {
		return nil, err
	}
	by := sessionOf(ctx).submitter()
	if room.Domain() == a.n.cfg.Domain {
		err = a.n.reportAbuse(by, room, req.Msg.Body)
	} else {
		err = a.n.proxyReport(ctx, by, room, req.Msg.Body)
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(new(api.ReportAbuseResponse)), nil
}

// UpdateConsent requests, cancels, grants or revokes consent.
func (a clientAPI) UpdateConsent(ctx context.Context, req *connect.Request[api.UpdateConsentRequest]) (*connect.Response[api.UpdateConsentResponse], error) {
	var e mimi.ConsentEntry
	if err := decode(req.Msg.Entry, &e); err != nil {
		return nil, err
	}
	if err := a.n.consentAction(sessionOf(ctx).user, &e, req.Msg.KeyPackages); err != nil {
		return nil, err
	}
	return connect.NewResponse(new(api.UpdateConsentResponse)), nil
}

// Consents lists the consents of the client's user.
func (a clientAPI) Consents(ctx context.Context, _ *connect.Request[api.ConsentsRequest]) (*connect.Response[api.ConsentsResponse], error) {
	list, err := a.n.consents(sessionOf(ctx).user)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&api.ConsentsResponse{Consents: list}), nil
}

// LastSent returns the last application message of the client in a group that this node knows of.
func (a clientAPI) LastSent(ctx context.Context, req *connect.Request[api.LastSentRequest]) (*connect.Response[api.LastSentResponse], error) {
	last, err := a.n.lastSent(sessionOf(ctx).client, sha256.Sum256(req.Msg.Group))
	if err != nil {
		return nil, err
	}
	if last == nil {
		return connect.NewResponse(new(api.LastSentResponse)), nil
	}
	return connect.NewResponse(&api.LastSentResponse{Known: true, Epoch: last.epoch, Generation: last.generation, Hash: last.hash}), nil
}

// NoteSent notes an application message that the client doesn't submit itself.
func (a clientAPI) NoteSent(ctx context.Context, req *connect.Request[api.NoteSentRequest]) (*connect.Response[api.NoteSentResponse], error) {
	if err := a.n.disk.grow(); err != nil {
		return nil, err
	}
	var m mls.MLSMessage
	if err := decode(req.Msg.Message, &m); err != nil {
		return nil, err
	}
	if m.Private == nil {
		return nil, refuse("malformed", "an application message is a PrivateMessage")
	}
	by := sessionOf(ctx).submitter()
	by.generation = &req.Msg.Generation
	if err := a.n.note(markOf(by, m.Private, messageHash(&m))); err != nil {
		return nil, err
	}
	return connect.NewResponse(new(api.NoteSentResponse)), nil
}

// GroupInfo fetches what the client needs to join by an external commit from the room's hub.
func (a clientAPI) GroupInfo(ctx context.Context, req *connect.Request[api.MimiRequest]) (*connect.Response[api.MimiResponse], error) {
	room, err := roomURI(req.Msg.Room)
	if err != nil {
		return nil, err
	}
	var request mimi.GroupInfoRequest
	if err := decode(req.Msg.Body, &request); err != nil {
		return nil, err
	}
	if err := a.n.paceInfo(string(sessionOf(ctx).user), 1); err != nil {
		return nil, err
	}
	var resp *mimi.GroupInfoResponse
	if room.Domain() == a.n.cfg.Domain {
		resp, err = a.n.groupInfo(room, &request)
	} else {
		ctx, cancel := context.WithTimeout(ctx, proxyTimeout)
		defer cancel()
		if resp, err = a.n.federation.GroupInfo(ctx, room.Domain(), room, &request); err != nil {
			err = a.n.unreachable(room.Domain(), err)
		}
	}
	if err != nil {
		return nil, err
	}
	answer := &api.MimiResponse{Body: codec.Marshal(resp)}
	if resp.Code == mimi.GroupInfoSuccess {
		answer.Head = a.n.lastHead(room)
	}
	return connect.NewResponse(answer), nil
}

// UploadAsset takes the next bytes of an asset.
func (a clientAPI) UploadAsset(ctx context.Context, req *connect.Request[api.UploadAssetRequest]) (*connect.Response[api.UploadAssetResponse], error) {
	u, err := a.n.uploadAsset(sessionOf(ctx).user, req.Msg.Hash, req.Msg.Size, req.Msg.Offset, req.Msg.Data)
	if err != nil {
		return nil, err
	}
	resp := &api.UploadAssetResponse{Offset: u.offset, ExpiresUnix: int64(u.expires)}
	if u.whole {
		resp.Url = federation.AssetURL(a.n.cfg.Domain, [sha256.Size]byte(req.Msg.Hash))
	}
	return connect.NewResponse(resp), nil
}

// DeleteAsset gives an asset up.
func (a clientAPI) DeleteAsset(ctx context.Context, req *connect.Request[api.DeleteAssetRequest]) (*connect.Response[api.DeleteAssetResponse], error) {
	if err := a.n.deleteAsset(sessionOf(ctx).user, req.Msg.Hash, math.MaxUint64); err != nil {
		return nil, err
	}
	return connect.NewResponse(new(api.DeleteAssetResponse)), nil
}

// DownloadAsset streams an asset.
func (a clientAPI) DownloadAsset(ctx context.Context, req *connect.Request[api.DownloadAssetRequest], out *connect.ServerStream[api.DownloadAssetResponse]) error {
	room, err := roomURI(req.Msg.Room)
	if err != nil {
		return err
	}
	asset, err := a.n.downloadFor(ctx, sessionOf(ctx).user, room, req.Msg.Url)
	if err != nil {
		return err
	}
	defer asset.Close()
	buf := make([]byte, downloadBuffer)
	for left := asset.Size; left > 0; {
		k, err := io.ReadFull(asset, buf[:min(left, int64(len(buf)))])
		if err != nil {
			return a.n.unreachable(room.Domain(), err)
		}
		if err := out.Send(&api.DownloadAssetResponse{Size: uint64(asset.Size), Data: buf[:k]}); err != nil {
			return err
		}
		left -= int64(k)
	}
	return nil
}

// GatewayKeys returns the keys of a hub's oblivious gateway.
func (a clientAPI) GatewayKeys(ctx context.Context, req *connect.Request[api.GatewayKeysRequest]) (*connect.Response[api.GatewayKeysResponse], error) {
	room, err := roomURI(req.Msg.Room)
	if err != nil {
		return nil, err
	}
	keys, err := a.n.keysOfGateway(ctx, room.Domain(), mls.CipherSuite(req.Msg.CipherSuite))
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&api.GatewayKeysResponse{Keys: codec.Marshal(keys)}), nil
}

// Oblivious relays a request.
func (a clientAPI) Oblivious(ctx context.Context, req *connect.Request[api.ObliviousRequest]) (*connect.Response[api.ObliviousResponse], error) {
	room, err := roomURI(req.Msg.Room)
	if err != nil {
		return nil, err
	}
	response, err := a.n.relay(ctx, sessionOf(ctx).user, room.Domain(), req.Msg.Request)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&api.ObliviousResponse{Response: response}), nil
}

// Acknowledge deletes Welcomes that the client has, moves its cursors, and ends memberships.
func (a clientAPI) Acknowledge(ctx context.Context, req *connect.Request[api.AcknowledgeRequest]) (*connect.Response[api.AcknowledgeResponse], error) {
	if err := a.n.acknowledge(sessionOf(ctx), req.Msg); err != nil {
		return nil, err
	}
	return connect.NewResponse(new(api.AcknowledgeResponse)), nil
}

func roomURI(s string) (mimi.URI, error) {
	u, err := mimi.ParseURI(s)
	if err != nil {
		return "", refuse("malformed", "%v", err)
	}
	if u.Kind() != mimi.KindRoom {
		return "", refuse("malformed", "%s isn't a room", u)
	}
	return u, nil
}
