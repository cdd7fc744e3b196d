package node

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/federation/mimi"
	"github.com/parley-mls/parley/mls"
	"github.com/parley-mls/parley/transport"
)

// Config says what a node is. Domain, Data and Listen are required; the zero value of every other field has a
// default. Its YAML form is what parley-node serve reads.
type Config struct {
	// Domain is the provider's domain, lower case.
	Domain string `yaml:"domain"`
	// Data is the directory of everything that the node keeps.
	Data string `yaml:"data"`
	// Listen is the host:port to bind, for UDP and TCP alike.
	Listen string `yaml:"listen"`
	// Advertise is the host:port at which peers and clients reach the node; empty means Listen.
	Advertise string `yaml:"advertise"`
	// Gossip is the profile of gossip: "local" for one machine, "lan" (the default) or "wan".
	Gossip string `yaml:"gossip"`
	// Peers are approved at every start, in addition to those approved with parley-node peers.
	Peers []PeerConfig `yaml:"peers"`
	// Suites are the cipher suites in which this node hosts rooms; empty means all for whose keys there are certificates.
	Suites []mls.CipherSuite `yaml:"suites"`
	// Consent says what users of peers need to fetch KeyPackages of users of this node who haven't decided about them:
	// nothing (ConsentOpen, the default) or the user's consent (ConsentExplicit).
	Consent string `yaml:"consent"`
	// Search says whose queries find users of this node, as far as these want to be found: those of users of peers too
	// (SearchOpen, the default), or of own users only (SearchOwn).
	Search string `yaml:"search"`
	// Push says which endpoints may wake clients: those at public addresses (PushPublic, the default), at any address
	// (PushPrivate), or none (PushOff).
	Push      string     `yaml:"push"`
	Retention Retention  `yaml:"retention"`
	Disk      DiskConfig `yaml:"disk"`
	// RestoreMinutes is how long a node that was restored from a backup waits for peers, to ask them what came after; 0
	// means 10. It serves nobody meanwhile.
	RestoreMinutes int       `yaml:"restore_minutes"`
	Limits         Limits    `yaml:"limits"`
	Log            LogConfig `yaml:"log"`

	// Time is the clock by which the credentials of clients are judged; nil means time.Now.
	Time func() time.Time `yaml:"-"`

	// For tests: roots of push services, and other times than pushDelay and pushRetry.
	pushRoots            *x509.CertPool
	pushDelay, pushRetry time.Duration
	restoreFor           time.Duration // instead of RestoreMinutes
	// For tests: what is free, in bytes, instead of what the disk says.
	diskFree func() (uint64, error)

	retainMost, retainStored time.Duration // for tests, instead of Retention
}

// The values of Config.Consent, Config.Search and Config.Push.
const (
	ConsentOpen     = "open"
	ConsentExplicit = "explicit"
	SearchOpen      = "open"
	SearchOwn       = "own"
	PushPublic      = "public"
	PushPrivate     = "private"
	PushOff         = "off"
)

// Retention says for how long a room's log is kept, in days of 24 hours that the node runs.
type Retention struct {
	// Days is for how long at most what a client or a peer hasn't got yet is kept; 0 means 90. One that is away for longer
	// enters the room anew and shows the gap.
	Days int `yaml:"days"`
	// StoredDays is for how long what all have got is kept, so that peers can be restored from backups; 0 means 7.
	StoredDays int `yaml:"stored_days"`
}

// PeerConfig is a peer that the configuration approves.
type PeerConfig struct {
	Domain string `yaml:"domain"`
	// Fingerprint is the SHA-256 of the peer's root certificate, in hexadecimal.
	Fingerprint string `yaml:"fingerprint"`
	// Address is the host:port where the peer is known to be; empty means that gossip has to find it.
	Address string `yaml:"address"`
}

// Limits bound what a client, a user, a peer, or an address can ask of the node. Whoever asks for more is told so by the
// code "busy", and when to come back.
type Limits struct {
	// RequestsPerSecond is how many requests a client may make in the long run; 0 means 1000. A burst may have
	// twice as many, all clients of a user together four times as many.
	RequestsPerSecond int `yaml:"requests_per_second"`
	// BytesPerSecond is how much a client may send in the long run; 0 means 32 MiB. Bursts and all clients of a user are
	// as with requests.
	BytesPerSecond int `yaml:"bytes_per_second"`
	// BytesInFlight is how much all requests of a client that haven't been answered may have; 0 means 64 MiB.
	BytesInFlight int `yaml:"bytes_in_flight"`
	// PeerRequestsPerSecond is how many requests a peer may make in the long run; 0 means 20,000. A burst may have twice
	// as many.
	PeerRequestsPerSecond int `yaml:"peer_requests_per_second"`
	// PeerBytesPerSecond is how much a peer may send in the long run; 0 means 128 MiB. A burst may have twice as much.
	PeerBytesPerSecond int `yaml:"peer_bytes_per_second"`
	// PeerQueue is how many entries of logs may wait for a peer; 0 means 1,000,000. When there are more, the rooms with the
	// most lose their oldest, and the peer's clients have to enter these rooms anew once it is back.
	PeerQueue int `yaml:"peer_queue"`
	// Connections is how many connections clients may have at a time, over QUIC and over TCP each; 0 means 16,384.
	Connections int `yaml:"connections"`
	// AddressConnections is how many of them may be from one address; 0 means 4,096.
	AddressConnections int `yaml:"address_connections"`
	// HandshakesPerSecond is how many QUIC connections may begin without a proof of their address; 0 means 100. Beyond
	// that they cost a round trip more. Addresses whose handshakes were refused have fewer.
	HandshakesPerSecond int `yaml:"handshakes_per_second"`
	// Rooms is how many rooms a user may create here; 0 means 10,000.
	Rooms int `yaml:"rooms"`
	// Members is how many clients, and how many users, may be in a room that is hosted here; 0 means 10,000.
	Members int `yaml:"members"`
	// Reports is how many reports of abuse, and messages in them, a user may send at once, and again within 1,000
	// seconds; 0 means 1000. All users of a peer together may send a hundred times as many.
	Reports int `yaml:"reports"`
	// EphemeralPerSecond is how many ephemeral messages (typing, receipts) a user may send in the long run; 0 means 10. A
	// burst may have twice as many, all users of a peer a hundred times as many.
	EphemeralPerSecond int `yaml:"ephemeral_per_second"`
	// GroupInfos is how often a user may ask for what it takes to join a room at once, and again within 1,000 seconds; 0
	// means 5000. All users of a peer together may ask a hundred times as often.
	GroupInfos int `yaml:"group_infos"`
	// AnonymousPerSecond is how many enrolments and authentications an address may try in the long run; 0 means
	// 50. A burst may have four times as many.
	AnonymousPerSecond int `yaml:"anonymous_per_second"`
	// RequestBytes is the size of the largest request of a client; 0 means 16 MiB.
	RequestBytes int `yaml:"request_bytes"`
	// KeyPackages is how many unclaimed KeyPackages a client may have here; 0 means 200.
	KeyPackages int `yaml:"key_packages"`
	// KeyPackageDays is how long a KeyPackage may be valid, from its publication; 0 means 100 days. MLS allows 400.
	KeyPackageDays int `yaml:"key_package_days"`
	// ClaimsPerRequester is how often a user may claim KeyPackages at once, and again within 1,000 seconds; 0 means 5000.
	ClaimsPerRequester int `yaml:"claims_per_requester"`
	// ClaimsPerTarget is how often a user, or a peer's hub, may claim KeyPackages of one user at once, and again within
	// 1,000 seconds; 0 means 100.
	ClaimsPerTarget int `yaml:"claims_per_target"`
	// Streams is how many Subscribe streams a client may have open at a time; 0 means 4.
	Streams int `yaml:"streams"`
	// Consents is how many requests for consent and decisions a user may send at once, and again within 1,000 seconds; 0
	// means 100. All users of a peer together may send a hundred times as many.
	Consents int `yaml:"consents"`
	// Queries is how many identifier queries a user may make at once, and again within 1,000 seconds; 0 means 200. All
	// users of a peer together may make a hundred times as many.
	Queries int `yaml:"queries"`
	// GraceDays is how long a client stays in the rooms that are hosted here after its certificate has expired, or its leaf
	// should have been renewed, before its removal is proposed; 0 means 7 days.
	GraceDays int `yaml:"grace_days"`
	// AssetMiB is the size of the largest asset that is taken from a client, or passed on, in MiB; 0 means 100.
	AssetMiB int `yaml:"asset_mib"`
	// AssetQuotaMiB is how much the assets of a user may take here together, in MiB; 0 means 1024.
	AssetQuotaMiB int `yaml:"asset_quota_mib"`
	// AssetDays is how long an asset is kept, in days; 0 means 90.
	AssetDays int `yaml:"asset_days"`
	// Downloads is how many assets a user may fetch at once, and again within 1,000 seconds; 0 means 1000. A peer may fetch
	// a hundred times as many for its users.
	Downloads int `yaml:"downloads"`
}

// DiskConfig says when the disk of the data directory counts as full.
type DiskConfig struct {
	// ReserveMiB is how much has to be free, in MiB, for the node to take in anything; 0 means 256. It goes on once a
	// quarter more is free.
	ReserveMiB int `yaml:"reserve_mib"`
	// BallastMiB is the size, in MiB, of a file that only takes up space and is given back if the disk is full all the same;
	// 0 means 16.
	BallastMiB int `yaml:"ballast_mib"`
}

// LogConfig says what the node logs to standard error.
type LogConfig struct {
	// Level is "debug", "info" (the default), "warn" or "error".
	Level string `yaml:"level"`
	// Format is "text" (the default) or "json".
	Format string `yaml:"format"`
}

// LoadConfig reads a configuration file. The error names the field that is wrong.
func LoadConfig(path string) (Config, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("reading the configuration: %w", err)
	}
	cfg, err := ParseConfig(b)
	if err != nil {
		return Config{}, fmt.Errorf("configuration %s: %w", path, err)
	}
	return cfg, nil
}

// ParseConfig reads a configuration in YAML, fills in the defaults and validates it.
func ParseConfig(b []byte) (Config, error) {
	var cfg Config
	d := yaml.NewDecoder(bytes.NewReader(b))
	d.KnownFields(true)
	if err := d.Decode(&cfg); err != nil && !errors.Is(err, io.EOF) {
		return Config{}, err
	}
	if err := d.Decode(new(any)); !errors.Is(err, io.EOF) {
		return Config{}, errors.New("there is a second document in the file")
	}
	return cfg, cfg.complete()
}

// complete fills in the defaults and validates the configuration.
func (c *Config) complete() error {
	if c.Domain == "" {
		return errors.New("domain: missing")
	}
	if err := mimi.ValidDomain(c.Domain); err != nil {
		return fmt.Errorf("domain: %w", err)
	}
	if c.Data == "" {
		return errors.New("data: missing")
	}
	if c.Listen == "" {
		return errors.New("listen: missing")
	}
	if err := checkAddress(c.Listen, true); err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	if c.Advertise != "" {
		if err := checkAddress(c.Advertise, false); err != nil {
			return fmt.Errorf("advertise: %w", err)
		}
	}
	switch c.Gossip {
	case "":
		c.Gossip = "lan"
	case "local", "lan", "wan":
	default:
		return fmt.Errorf("gossip: %q is not one of local, lan, wan", c.Gossip)
	}
	switch c.Search {
	case "":
		c.Search = SearchOpen
	case SearchOpen, SearchOwn:
	default:
		return fmt.Errorf("search: %q is not one of %s, %s", c.Search, SearchOpen, SearchOwn)
	}
	switch c.Push {
	case "":
		c.Push = PushPublic
	case PushPublic, PushPrivate, PushOff:
	default:
		return fmt.Errorf("push: %q is not one of %s, %s, %s", c.Push, PushPublic, PushPrivate, PushOff)
	}
	switch c.Consent {
	case "":
		c.Consent = ConsentOpen
	case ConsentOpen, ConsentExplicit:
	default:
		return fmt.Errorf("consent: %q is not one of %s, %s", c.Consent, ConsentOpen, ConsentExplicit)
	}
	for i, p := range c.Peers {
		if _, err := p.fingerprint(); err != nil {
			return fmt.Errorf("peers[%d].fingerprint: %w", i, err)
		}
		if err := mimi.ValidDomain(p.Domain); err != nil {
			return fmt.Errorf("peers[%d].domain: %w", i, err)
		}
		if p.Domain == c.Domain {
			return fmt.Errorf("peers[%d].domain: %s is this node's own", i, p.Domain)
		}
		if p.Address != "" {
			if err := checkAddress(p.Address, false); err != nil {
				return fmt.Errorf("peers[%d].address: %w", i, err)
			}
		}
	}
	if len(c.Suites) == 0 {
		c.Suites = slices.DeleteFunc(mls.CipherSuites(), func(s mls.CipherSuite) bool { return !s.X509() })
	}
	for i, s := range c.Suites {
		if !s.Supported() || !s.X509() {
			return fmt.Errorf("suites[%d]: cipher suite %d is not supported", i, s)
		}
		if slices.Contains(c.Suites[:i], s) {
			return fmt.Errorf("suites[%d]: cipher suite %d is listed twice", i, s)
		}
	}
	for _, l := range []struct {
		name     string
		value    *int
		standard int
		max      int
	}{
		{"limits.requests_per_second", &c.Limits.RequestsPerSecond, 1000, 1_000_000},
		{"limits.bytes_per_second", &c.Limits.BytesPerSecond, 32 << 20, 1 << 28},
		{"limits.bytes_in_flight", &c.Limits.BytesInFlight, 64 << 20, 1 << 30},
		{"limits.peer_requests_per_second", &c.Limits.PeerRequestsPerSecond, 20_000, 1_000_000},
		{"limits.peer_bytes_per_second", &c.Limits.PeerBytesPerSecond, 128 << 20, 1 << 30},
		{"limits.peer_queue", &c.Limits.PeerQueue, 1_000_000, 1_000_000_000},
		{"limits.connections", &c.Limits.Connections, transport.DefaultMaxConnections, 1_000_000},
		{"limits.address_connections", &c.Limits.AddressConnections, transport.DefaultMaxAddressConnections, 1_000_000},
		{"limits.handshakes_per_second", &c.Limits.HandshakesPerSecond, transport.DefaultHandshakesPerSecond, 1_000_000},
		{"limits.rooms", &c.Limits.Rooms, 10_000, 1_000_000},
		{"limits.members", &c.Limits.Members, 10_000, 1_000_000},
		{"limits.reports", &c.Limits.Reports, 1000, 1_000_000},
		{"limits.ephemeral_per_second", &c.Limits.EphemeralPerSecond, 10, 100_000},
		{"limits.group_infos", &c.Limits.GroupInfos, 5000, 1_000_000},
		{"limits.anonymous_per_second", &c.Limits.AnonymousPerSecond, 50, 1_000_000},
		{"limits.request_bytes", &c.Limits.RequestBytes, 16 << 20, 256 << 20},
		{"limits.key_packages", &c.Limits.KeyPackages, 200, 10_000},
		{"limits.key_package_days", &c.Limits.KeyPackageDays, 100, int(mls.MaxLifetime / (24 * time.Hour))},
		{"limits.claims_per_requester", &c.Limits.ClaimsPerRequester, 5000, 1_000_000},
		{"limits.claims_per_target", &c.Limits.ClaimsPerTarget, 100, 1_000_000},
		{"limits.streams", &c.Limits.Streams, 4, 1000},
		{"limits.queries", &c.Limits.Queries, 200, 1_000_000},
		{"limits.consents", &c.Limits.Consents, 100, 1_000_000},
		{"limits.grace_days", &c.Limits.GraceDays, 7, 3650},
		{"limits.asset_mib", &c.Limits.AssetMiB, 100, 65_535}, // what AES-GCM can encrypt
		{"limits.asset_quota_mib", &c.Limits.AssetQuotaMiB, 1024, 1 << 30},
		{"limits.asset_days", &c.Limits.AssetDays, 90, 36_500},
		{"limits.downloads", &c.Limits.Downloads, 1000, 1_000_000},
		{"disk.reserve_mib", &c.Disk.ReserveMiB, 256, 1 << 30},
		{"disk.ballast_mib", &c.Disk.BallastMiB, 16, 1 << 20},
	} {
		if *l.value < 0 || *l.value > l.max {
			return fmt.Errorf("%s: %d is not between 0 and %d", l.name, *l.value, l.max)
		}
		if *l.value == 0 {
			*l.value = l.standard
		}
	}
	if r := &c.Retention; r.Days < 0 || r.Days > 36_500 {
		return fmt.Errorf("retention.days: %d is not between 0 and 36500", r.Days)
	} else if r.Days = cmp.Or(r.Days, 90); r.StoredDays < 0 || r.StoredDays > r.Days {
		return fmt.Errorf("retention.stored_days: %d is not between 0 and %d", r.StoredDays, r.Days)
	} else if r.StoredDays == 0 {
		r.StoredDays = min(7, r.Days)
	}
	if c.RestoreMinutes < 0 || c.RestoreMinutes > 7*24*60 {
		return fmt.Errorf("restore_minutes: %d is not between 0 and %d", c.RestoreMinutes, 7*24*60)
	}
	if c.RestoreMinutes == 0 {
		c.RestoreMinutes = 10
	}
	if _, err := c.Log.level(); err != nil {
		return err
	}
	if c.Log.Format != "" && c.Log.Format != "text" && c.Log.Format != "json" {
		return fmt.Errorf("log.format: %q is not one of text, json", c.Log.Format)
	}
	return nil
}

// checkAddress accepts host:port; port 0 and an empty host only where the address is for binding.
func checkAddress(address string, bind bool) error {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return fmt.Errorf("%q is not host:port", address)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || (n == 0 && !bind) {
		return fmt.Errorf("port %q is not a number from 1 to 65535", port)
	}
	if host == "" && !bind {
		return fmt.Errorf("%q has no host", address)
	}
	return nil
}

func (c *Config) restoreWait() time.Duration {
	return cmp.Or(c.restoreFor, time.Duration(c.RestoreMinutes)*time.Minute)
}

// Socket returns the path of the admin socket.
func (c Config) Socket() string { return AdminSocket(c.Data) }

// AdminSocket returns the path of the admin socket of the node with that data directory.
func AdminSocket(data string) string { return filepath.Join(data, "admin.sock") }

// StoreDir returns the directory of the store in that data directory.
func StoreDir(data string) string { return filepath.Join(data, "store") }

// AuthorityDir returns the directory of the authority in that data directory.
func AuthorityDir(data string) string { return filepath.Join(data, "authority") }

func keysDir(data string) string { return filepath.Join(data, "keys") }

func (p PeerConfig) fingerprint() (authority.Fingerprint, error) {
	if p.Fingerprint == "" {
		return authority.Fingerprint{}, errors.New("missing")
	}
	return authority.ParseFingerprint(p.Fingerprint)
}

func (l LogConfig) level() (slog.Level, error) {
	var level slog.Level
	if l.Level == "" {
		return slog.LevelInfo, nil
	}
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, l.Level) {
		return 0, fmt.Errorf("log.level: %q is not one of debug, info, warn, error", l.Level)
	}
	return level, level.UnmarshalText([]byte(l.Level))
}

// Logger returns a logger to w as the configuration wants it.
func (l LogConfig) Logger(w io.Writer) *slog.Logger {
	level, err := l.level()
	if err != nil {
		level = slog.LevelInfo
	}
	o := &slog.HandlerOptions{Level: level}
	if l.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}

// ConfigHelp describes the configuration file.
const ConfigHelp = `The configuration is a YAML file. Only the first three fields are required.

domain: alpha.example          # the provider's domain
data: /var/lib/parley          # directory of the store, assets, keys, authority and admin socket
listen: 0.0.0.0:7440           # UDP and TCP, the same port
advertise: node.alpha.example:7440   # where peers and clients reach it; default: listen
gossip: lan                    # local (one machine), lan or wan
suites: [1, 2, 3, 5, 7]        # cipher suites of hosted rooms, 0xf001 to 0xf00b the post-quantum ones; default: all
consent: open                  # who may fetch KeyPackages of users: open (users of approved peers) or explicit (whom the user allows)
search: open                   # whose searches find users who want to be found: open (users of peers too) or own
push: public                   # where clients may have themselves woken: public (addresses), private (any address) or off
restore_minutes: 10            # how long a node that was restored from a backup waits for peers
peers:                         # approved at every start, besides those of "peers approve"
  - domain: beta.example
    fingerprint: <SHA-256 of beta's root, in hexadecimal>
    address: node.beta.example:7440  # optional
retention:                     # of rooms' logs, in days that the node runs; a room's policy may have hosted ones kept shorter or longer
  days: 90                     # at most, of what a client or peer hasn't got yet: one that is away for longer enters its rooms anew
  stored_days: 7               # of what all have got; as long as the time between backups, at least, of this node and its peers
limits:
  # More is refused with the code "busy", which says when to come back.
  requests_per_second: 1000    # of one client; all of a user's: four times as many
  bytes_per_second: 33554432   # of one client; all of a user's: four times as many
  bytes_in_flight: 67108864    # of requests of one client that aren't answered yet
  request_bytes: 16777216      # the largest request of a client
  anonymous_per_second: 50     # enrolments and authentications from one address
  connections: 16384           # of clients, over QUIC and TCP each
  address_connections: 4096    # of those, from one address
  handshakes_per_second: 100   # that begin without a proof of the address (QUIC Retry)
  peer_requests_per_second: 20000
  peer_bytes_per_second: 134217728
  peer_queue: 1000000          # entries that wait for a peer; beyond, the oldest are dropped
  rooms: 10000                 # created here by one user
  members: 10000               # clients, and users, in a room that is hosted here
  reports: 1000                # of abuse, and messages in them, of a user, at once and per 1,000 s
  ephemeral_per_second: 10     # typing and receipts of a user
  group_infos: 5000            # requests for what joining takes, of a user, at once and per 1,000 s
  key_packages: 200            # unclaimed ones of a client
  key_package_days: 100        # of validity, at most
  claims_per_requester: 5000   # claims of KeyPackages by one user, at once and per 1,000 s
  claims_per_target: 100       # of those, claims of one user's
  streams: 4                   # event streams of a client
  queries: 200                 # searches of a user, at once and per 1,000 s
  consents: 100                # requests for consent and decisions of a user, at once and per 1,000 s
  asset_mib: 100               # of one asset, MiB
  asset_quota_mib: 1024        # of the assets of a user, MiB
  grace_days: 7                # that a client stays in rooms without a valid certificate, or with a leaf that is late
  asset_days: 90               # that an asset is kept
  downloads: 1000              # of assets by a user, at once and per 1,000 s
disk:
  reserve_mib: 256             # below that much free space the node is read-only
  ballast_mib: 16              # given back when the disk is full all the same
log:
  level: info                  # debug, info, warn or error
  format: text                 # text or json
`
