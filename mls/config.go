package mls

import (
	"cmp"
	"crypto/rand"
	"io"
	"math/bits"
	"time"
)

// Config is what a Group takes from its application. Only Verifier is required. A Config must not change while
// groups use it. What it holds is called by as many goroutines at once as call methods of its groups; see Group for what
// it may call in turn.
type Config struct {
	// Rand is the source of all randomness; nil means crypto/rand.
	Rand io.Reader
	// Time is the clock that lifetimes of leaves are compared with when this client sends them, and that tells the age
	// of past epochs; nil means time.Now.
	Time func() time.Time
	// Verifier is the authentication service.
	Verifier CredentialVerifier
	// Components interpret AppDataUpdate and AppEphemeral proposals. A proposal for a component that isn't here is invalid.
	Components map[ComponentID]Component
	// PSK returns the external or component's pre-shared key of that identifier (RFC 9420, Section 8.4;
	// draft-ietf-mls-extensions, Section 4.5). nil means that there are none. Resumption keys of the current and of
	// past epochs of the group itself are found without it, and those of groups that Group finds.
	PSK func(id PreSharedKeyID) ([]byte, error)
	// Group returns this client's state in another group, nil if it has none, so that the resumption keys of that
	// group can be used in this one (RFC 9420, Section 8.4, usage application): of its current epoch and of those that
	// its MaxPastEpochs keeps. It is called while a commit with such a key is made or processed, or a Welcome. nil means
	// that there are no others.
	Group func(id []byte) *Group
	// HandshakeFormat is how this client sends proposals and commits to the group: as WireFormatPublicMessage, as
	// WireFormatPrivateMessage, which servers can't follow (RFC 9420, Section 6), or as WireFormatSemiPrivateMessage,
	// which those can that the group names as external receivers (draft-mahy-mls-semiprivatemessage); where a group
	// doesn't require that format or names none, handshakes fail then. 0 means the first. It takes any of them
	// from others, and external commits are always public.
	HandshakeFormat WireFormat
	// Padding returns the length in bytes that the content of a PrivateMessage, n bytes with its signature, is padded
	// to; less than n means no padding. nil means a quarter of the next power of two as the step, at least 64
	// bytes: lengths fall in four classes per doubling and grow by a quarter or less (past 128 bytes).
	Padding func(n int) int
	// MaxPastEpochs is how many epochs before the current one still decrypt late application messages;
	// 0 means 4, less than 0 none.
	MaxPastEpochs int
	// MaxPastAge is how long after its end a past epoch is kept at most; 0 means seven days, less than 0 for as long as
	// MaxPastEpochs says. An epoch that was saved in format 1 ends when it is loaded.
	MaxPastAge time.Duration
	// MaxSkippedKeys is how many keys of messages not yet seen are kept per sender, epoch and kind of message
	// (application data or handshake); 0 means 1000, less than 0 none.
	MaxSkippedKeys int
	// MaxForward is how many generations at once a sender's ratchet may be moved on by one message (RFC 9420, Section
	// 15.3), which fails with ErrGeneration past it; 0 means 100,000, which takes about a tenth of a second.
	MaxForward uint32
	// MaxLifetime is the longest total lifetime of a new member's leaf, the same for all members (RFC 9420,
	// Section 7.2); 0 means the constant of that name, less than 0 no limit.
	MaxLifetime time.Duration
	// NewMemberProposals accepts the Add proposals of clients who ask to be added (RFC 9420, Section 12.1.8); the next
	// commit of pending proposals has them. It must be the same for all members. Verifier judges their
	// credentials; Policy, which sees the sender of each committed proposal, has to judge who is authorized.
	NewMemberProposals bool
	// Policy, if set, sees every commit, own ones too, after the checks of RFC 9420 and before it is staged; an
	// error refuses it. It is for rules that all members judge alike. The StagedInfo is valid until Policy returns.
	Policy func(*StagedInfo) error
}

// Component is the application's logic for one component of the app_data_dictionary (draft-ietf-mls-extensions,
// Section 4.7). All members must compute the same.
type Component interface {
	// Update returns the new data from the current data, nil if there is none, and the updates in the order in
	// which the commit has them. An error makes the commit invalid.
	Update(current []byte, updates [][]byte) ([]byte, error)
}

// EphemeralComponent is a Component that AppEphemeral proposals may be for (draft-ietf-mls-extensions, Section 4.8); for
// others they are invalid. The data of those that a commit brings is in StagedInfo.
type EphemeralComponent interface {
	// CheckEphemeral says whether the data is valid. All members must say the same.
	CheckEphemeral(data []byte) error
}

// PublicConfig is what a PublicGroup takes from its application. Only Verifier is required.
type PublicConfig struct {
	// Time is the clock that lifetimes of new leaves are compared with; nil means time.Now.
	Time func() time.Time
	// IgnoreLifetime leaves the lifetime of new leaves unchecked: for a follower of what somebody else ordered.
	IgnoreLifetime bool
	// Verifier, Components, MaxLifetime, NewMemberProposals and Policy are as in Config.
	Verifier           CredentialVerifier
	Components         map[ComponentID]Component
	MaxLifetime        time.Duration
	NewMemberProposals bool
	Policy             func(*StagedInfo) error
}

const (
	defaultPastEpochs  = 4
	defaultPastAge     = 7 * 24 * time.Hour
	defaultSkippedKeys = 1000
	defaultMaxForward  = 100_000
	minPadding         = 64
)

func (c *Config) rand() io.Reader {
	if c.Rand != nil {
		return c.Rand
	}
	return rand.Reader
}

func (c *Config) now() time.Time {
	if c.Time != nil {
		return c.Time()
	}
	return time.Now()
}

func (c *Config) limits() ratchetLimits {
	return ratchetLimits{maxForward: cmp.Or(c.MaxForward, defaultMaxForward), maxSkipped: cmp.Or(c.MaxSkippedKeys, defaultSkippedKeys)}
}

func (c *Config) pastEpochs() int {
	switch {
	case c.MaxPastEpochs < 0:
		return 0
	case c.MaxPastEpochs == 0:
		return defaultPastEpochs
	}
	return c.MaxPastEpochs
}

// expired says whether a past epoch that ended at that time, in seconds since 1970, is too old by now.
func (c *Config) expired(ended uint64) bool {
	age := cmp.Or(c.MaxPastAge, defaultPastAge)
	return age >= 0 && c.now().Sub(time.Unix(int64(ended), 0)) > age
}

func (c *Config) padded(n int) int {
	if c.Padding != nil {
		return max(n, c.Padding(n))
	}
	if n <= minPadding {
		return minPadding
	}
	step := max(1<<(bits.Len(uint(n-1))-2), minPadding/2)
	return (n + step - 1) / step * step
}

func (c *Config) rules() rules {
	return rules{verifier: c.Verifier, components: c.Components, policy: c.Policy, newMembers: c.NewMemberProposals,
		maxLifetime: cmp.Or(c.MaxLifetime, MaxLifetime)}
}

func (c *PublicConfig) rules() rules {
	r := rules{verifier: c.Verifier, components: c.Components, policy: c.Policy, newMembers: c.NewMemberProposals,
		maxLifetime: cmp.Or(c.MaxLifetime, MaxLifetime)}
	switch {
	case c.IgnoreLifetime:
	case c.Time != nil:
		r.now = c.Time
	default:
		r.now = time.Now
	}
	return r
}
