package mls

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// rule is a validation rule of RFC 9420 that isn't about one handshake message; those are violations. The test that
// breaks it is a function, with a slash and the name of a row if it has rows. A rule without a test isn't this
// package's, for the reason given.
type rule struct {
	section, rule string
	judges        judges
	test          string
	reason        string
}

// otherRules are in the order of RFC 9420.
var otherRules = []rule{
	// Decoding. What is decoded is public, but for Welcomes and the contents of PrivateMessages.
	{"2.1.1", "presence byte of an optional value", everyone, "codec.TestTrailingBytesAndPresenceBytesAreRefused", ""},
	{"2.1.2", "length not in its shortest form", everyone, "codec.TestLengthTakesItsShortestForm", ""},
	{"2.1.2", "length with prefix 3", everyone, "codec.TestLengthTakesItsShortestForm", ""},
	{"2.1.2", "vector longer than the message", everyone, "codec.TestWhatIsTooShortOrTooLongIsRefused", ""},
	{"6", "version of a message", everyone, "TestWhatIsNotOfItsTypeIsRefused/version", ""},
	{"6", "wire format", everyone, "TestWhatIsNotOfItsTypeIsRefused/wire format", ""},
	{"6", "sender type", everyone, "TestWhatIsNotOfItsTypeIsRefused/sender type 5", ""},
	{"6", "content type", everyone, "TestWhatIsNotOfItsTypeIsRefused/content type", ""},
	{"7.1", "unmerged leaves in increasing order", everyone, "TestWhatIsNotOfItsTypeIsRefused/unmerged leaves that do not ascend", ""},
	{"7.2", "source of a leaf", everyone, "TestWhatIsNotOfItsTypeIsRefused/source of a leaf", ""},
	{"8.4", "type of a pre-shared key", everyone, "TestWhatIsNotOfItsTypeIsRefused/type of pre-shared key", ""},
	{"8.4", "usage of a resumption key", everyone, "TestWhatIsNotOfItsTypeIsRefused/usage 4 of a resumption key", ""},
	{"12.4.3.3", "blank node at the end of a tree", everyone, "TestWhatIsNotOfItsTypeIsRefused/tree that ends with a blank node", ""},
	{"13.4", "extension type twice in a list", everyone, "TestWhatIsNotOfItsTypeIsRefused/extension twice", ""},

	// Credentials and clients.
	{"5.3", "key in the certificate is the leaf's", everyone, "", "CredentialVerifier gets both"},
	{"5.3.1", "credential of a downloaded KeyPackage", everyone, "TestKeyPackageRules", ""},
	{"5.3.1", "credentials of the tree's leaves", everyone, "TestJoinersRefuseWhatIsWrong/leaf's credential", ""},
	{"5.3.1", "credentials of external senders, on joining", everyone, "TestJoinersRefuseWhatIsWrong/external sender's credential", ""},
	{"5.3.1", "own credential, in a commit", membersOnly, "TestOwnCommitsKeepTheRules/credential", ""},
	{"5.3.2", "expiry and revocation", everyone, "", "the application's: what varies in time is judged by CredentialVerifier and Policy when it asks"},
	{"5.3.3", "one leaf for a client", everyone, "TestJoinersRefuseWhatIsWrong/two leaves of one client", ""},

	// Messages.
	{"6.1", "signature of a PrivateMessage", membersOnly, "TestNobodyEncryptsForAnother", ""},
	{"6.1", "signature covers wire format and group context", everyone, "TestSignatureCoversWireFormatAndGroupContext", ""},
	{"6.2", "membership tag of members only", membersOnly, "TestOnlyMembersHaveMembershipTags", ""},
	{"6.2", "application data isn't sent in a PublicMessage", everyone, "TestOnlyWhatIsSignedForAFormatIsFramedInIt/application data", ""},
	{"6.3.1", "padding is zero", membersOnly, "TestPrivateContentsAreDecodedStrictly/padding", ""},
	{"6.3.1", "every field of a PrivateMessage is authenticated", membersOnly, "TestEveryFieldOfAPrivateMessageIsProtected", ""},
	{"6.3.1", "limits of the AEAD", membersOnly, "", "a key encrypts one message, and 2^32 generations bound the keys"},
	{"6.3.2", "only members are framed in a PrivateMessage", membersOnly, "TestOnlyWhatIsSignedForAFormatIsFramedInIt/by an external sender", ""},
	{"6.3.2", "sender is a member", membersOnly, "TestNobodyEncryptsForAnother", ""},

	// Trees, as a joiner and a server get them.
	{"7.1", "keys of nodes are keys", everyone, "TestJoinersRefuseWhatIsWrong/leaf's encryption key", ""},
	{"7.2", "leaf lists its suite", everyone, "TestJoinersRefuseWhatIsWrong/leaf's suites", ""},
	{"7.2", "leaf lists its version", everyone, "TestJoinersRefuseWhatIsWrong/leaf's versions", ""},
	{"7.2", "default types aren't listed", everyone, "", "asked of who writes the list; values that say nothing are ignored"},
	{"7.2", "longest lifetime", everyone, "TestGroupsThatCannotBeJoinedAreRefused/lifetime of a leaf", ""},
	{"7.3", "signature of each leaf", everyone, "TestJoinersRefuseWhatIsWrong/leaf's signature", ""},
	{"7.3", "required capabilities of each leaf", everyone, "TestJoinersRefuseWhatIsWrong/required capability that members lack", ""},
	{"7.3", "lifetimes of leaves in a tree", everyone, "", "recommended only, and joiners at different times would not agree; what a client sends is checked"},
	{"7.3", "unique encryption keys", everyone, "TestValidationFindsBrokenTrees/key used twice", ""},
	{"7.3", "unique signature keys", everyone, "TestValidationFindsBrokenTrees/signature key used twice", ""},
	{"7.5", "path secret of a Welcome fits the tree", membersOnly, "TestForgedWelcomesAreRefused/path secret", ""},
	{"7.5", "member who is below the path, and has its keys", membersOnly, "TestPathsNeedTheirKeys", ""},
	{"7.7", "no more than 2^18 leaves", everyone, "TestNobodyIsAddedToAFullTree", "a limit of this package"},
	{"7.8", "tree hash", everyone, "TestJoinersRefuseWhatIsWrong/tree hash", ""},
	{"7.9.2", "every parent is parent-hash valid", everyone, "TestJoinersRefuseWhatIsWrong/parent hash", ""},

	// Keys.
	{"8.4", "nonce of a pre-shared key, in a Welcome", membersOnly, "TestForgedWelcomesAreRefused/nonce of a pre-shared key", ""},
	{"8.5", "length of an exported key", membersOnly, "TestExportedKeysAreBounded", "a bound of HKDF"},
	{"9.1", "each key encrypts one message", membersOnly, "TestMessagesOutOfOrderAreReadOnce", ""},
	{"9.1", "no generation after the last", membersOnly, "TestSecretTreesRunOut", ""},
	{"9.2", "consumed secrets are deleted", membersOnly, "TestUsedSecretsAreDeleted", ""},

	// KeyPackages and new groups.
	{"10", "version", everyone, "TestKeyPackageRules/other version", ""},
	{"10", "extensions are among the leaf's capabilities", everyone, "TestKeyPackageRules/extension not listed by the leaf", ""},
	{"10", "init keys are unique among a client's", membersOnly, "", "each KeyPackage is made with a fresh key"},
	{"10.1", "suite", everyone, "TestKeyPackageRules/unsupported suite", ""},
	{"10.1", "signature", everyone, "TestKeyPackageRules/changed key package", ""},
	{"10.1", "init key isn't the encryption key", everyone, "TestKeyPackageRules/init key equal to encryption key", ""},
	{"11", "founder's leaf and extensions", membersOnly, "TestFoundersMakeGroupsThatOthersCanJoin", ""},
	{"11", "suite is the best that all support", membersOnly, "", "the application chooses it"},
	{"11", "group identifier is unique", everyone, "", "the application's: it knows its groups and draws the identifier"},
	{"11.2", "group after a reinit is the one that was asked for", membersOnly, "TestGroupsThatDoNotFollowAreRefused", ""},
	{"11.2", "group that was reinitialised is used no more", everyone, "TestEndedGroupsAreOnlySucceeded", ""},
	{"11.3", "branch of the group", membersOnly, "TestGroupsThatDoNotFollowAreRefused", ""},

	// Commits and joining.
	{"12.2", "type of proposal that isn't supported by all members", everyone, "TestAppDataUpdateNeedsSupportOfAllWhoStay", ""},
	{"12.4", "pending proposals are committed before application data is sent", membersOnly, "TestMembersAgreeThroughTheLifeOfAGroup", ""},
	{"12.4", "own commit: list of proposals", membersOnly, "TestOwnCommitsKeepTheRules/remove of itself", ""},
	{"12.4.2", "staged commit is applied to the epoch it was staged for", everyone, "TestStagedCommitsFitTheStateTheyWereStagedFor", ""},
	{"12.4.2", "members without the pre-shared key", membersOnly, "TestWithoutTheFunctionThereAreNoPreSharedKeys", ""},
	{"12.4.3", "group identifier is unique among the client's groups", membersOnly, "", "JoinGroup's caller knows them"},
	{"12.4.3", "GroupInfo of a commit: context", serverOnly, "TestGroupInfoOfACommitIsChecked/context", ""},
	{"12.4.3", "GroupInfo of a commit: confirmation tag", serverOnly, "TestGroupInfoOfACommitIsChecked/confirmation tag", ""},
	{"12.4.3", "GroupInfo of a commit: signer", serverOnly, "TestGroupInfoOfACommitIsChecked/signer", ""},
	{"12.4.3", "GroupInfo of a commit: signature", serverOnly, "TestGroupInfoOfACommitIsChecked/signature", ""},
	{"12.4.3", "signature of a GroupInfo", everyone, "TestJoinersRefuseWhatIsWrong/signature", ""},
	{"12.4.3.1", "signer of a GroupInfo is a member", everyone, "TestJoinersRefuseWhatIsWrong/blank signer", ""},
	{"12.4.3.1", "Welcome for another KeyPackage", membersOnly, "TestWelcomeIsRefused/another key package", ""},
	{"12.4.3.1", "suite of a Welcome", membersOnly, "TestForgedWelcomesAreRefused/suite of the welcome", ""},
	{"12.4.3.1", "suite of its group", membersOnly, "TestForgedWelcomesAreRefused/suite of the group", ""},
	{"12.4.3.1", "pre-shared key of a Welcome that isn't there", membersOnly, "TestForgedWelcomesAreRefused/pre-shared key that isn't there", ""},
	{"12.4.3.1", "one resumption key for reinitialisation or branching at most", membersOnly, "TestGroupsThatDoNotFollowAreRefused", ""},
	{"12.4.3.1", "confirmation tag", membersOnly, "TestForgedWelcomesAreRefused/confirmation tag", ""},
	{"12.4.3.1", "leaf of the KeyPackage is in the tree", membersOnly, "TestForgedWelcomesAreRefused/tree without the joiner", ""},
	{"12.4.3.1", "unmerged leaves are members below their node", everyone, "TestValidationFindsBrokenTrees/unmerged leaf elsewhere in the tree", ""},
	{"12.4.3.1", "unmerged leaves are so at each node between", everyone, "TestValidationFindsBrokenTrees/unmerged leaf merged below", ""},
	{"12.4.3.2", "GroupInfo has a key for external commits", membersOnly, "TestExternalCommitsKeepTheRules/no key for external commits", ""},
	{"12.4.3.2", "own external commit: proposals", membersOnly, "TestExternalCommitsKeepTheRules/add", ""},
	{"12.4.3.3", "tree comes with the GroupInfo or beside it", everyone, "TestJoinersRefuseWhatIsWrong/no tree", ""},
	{"13.4", "group has extensions that a joiner doesn't support", everyone, "TestForgedWelcomesAreRefused/extension that the joiner doesn't support", ""},
	{"13.5", "reserved values are treated as unknown ones", everyone, "TestKeyPackagesCarryReservedValues", ""},
	{"14", "a commit is sent before its Welcome", membersOnly, "", "the application's: the Welcome is in the PendingCommit until the commit is accepted"},
	{"15.2", "messages of past epochs", membersOnly, "TestNoPastEpochsAreKeptIfNoneAreWanted", ""},
	{"15.3", "skipped generations", membersOnly, "TestSkippedKeysAreBounded", ""},
}

// TestEveryRuleNamesItsTest: the tests that the table names exist, with their rows, and each rule has a test or a reason.
func TestEveryRuleNamesItsTest(t *testing.T) {
	bodies := make(map[string]string)
	for dir, prefix := range map[string]string{".": "", "codec": "codec."} {
		files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range files {
			text, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			fset := token.NewFileSet()
			file, err := parser.ParseFile(fset, name, text, parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range file.Decls {
				if fd, ok := d.(*ast.FuncDecl); ok {
					bodies[prefix+fd.Name.Name] = string(text[fset.Position(fd.Pos()).Offset:fset.Position(fd.End()).Offset])
				}
			}
		}
	}
	for _, r := range otherRules {
		if r.test == "" {
			if r.reason == "" {
				t.Errorf("%s %s: neither test nor reason", r.section, r.rule)
			}
			continue
		}
		name, row, _ := strings.Cut(r.test, "/")
		body, ok := bodies[name]
		if !ok {
			t.Errorf("%s %s: there is no %s", r.section, r.rule, name)
		} else if row != "" && !strings.Contains(body, fmt.Sprintf("%q", row)) {
			t.Errorf("%s %s: %s has no row %q", r.section, r.rule, name, row)
		}
	}
	seen := make(map[string]bool)
	for _, v := range violations {
		name := strings.ReplaceAll(v.section+" "+v.rule, " ", "_")
		if seen[name] {
			t.Errorf("two rows %q", name)
		}
		seen[name] = true
	}
	guards, err := os.ReadFile(filepath.Join("internal", "mutate", "guards.txt"))
	if err != nil {
		t.Fatal(err)
	}
	for l := range strings.Lines(string(guards)) {
		_, row, ok := strings.Cut(l, "\tTestBrokenRulesAreRefused/")
		row, _, _ = strings.Cut(strings.TrimSpace(row), "\t")
		if ok && !seen[strings.ReplaceAll(row, " ", "_")] {
			t.Errorf("guards.txt names the row %q, which isn't there", row)
		}
	}
}
