//go:build unix

package mls

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"flag"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

var printTable = flag.Bool("table", false, "print what operations cost, beside the limits that the primitives set")

// TestTable prints what operations cost, and the limits that the primitives set, measured in the same run. One core is
// the process's CPU time with GOMAXPROCS=1, so that other load on the machine counts less; two cores is elapsed time.
// Both are the mean of the fastest of several rounds. With -short, groups have up to 1,000 members.
func TestTable(t *testing.T) {
	if !*printTable {
		t.Skip("go test ./mls -run '^TestTable$' -v -table prints the table")
	}
	tab := &table{results: make(map[string]*result), out: os.Stdout}
	tab.primitives.measure(testSuite)
	for _, row := range slices.Concat(tableRows, postQuantumRows()) {
		for _, k := range row.kinds(testing.Short()) {
			tab.measure(t, row, k)
		}
	}
	tab.primitives.measure(testSuite)
	tab.postQuantum.measure(postQuantumSuite)
	tab.measureMemory(t, 1_000)
	tab.print(testing.Short())
}

// primitives are the costs of a suite's, verification from the encoded key.
type primitives struct{ sign, verify, seal, open, derive, aead, ecdsa time.Duration }

// work counts the primitives that an operation can't do without.
type work struct{ sign, verify, seal, open, derive, aead, ecdsa float64 }

func (w work) limit(p primitives) time.Duration {
	return time.Duration(w.sign*float64(p.sign) + w.verify*float64(p.verify) + w.seal*float64(p.seal) +
		w.open*float64(p.open) + w.derive*float64(p.derive) + w.aead*float64(p.aead) + w.ecdsa*float64(p.ecdsa))
}

// tableRow is an operation of benchOps with its limit and its goal.
type tableRow struct {
	op    string
	title string
	kinds func(short bool) []benchKind
	work  func(tb testing.TB, g *benchGroup) work // nil: no primitive that can't be done without
}

// commitWork counts what a commit needs: the committer signs it, its leaf if there is a path, and the GroupInfo; there is
// a key pair for the leaf and for each node of the path, and a seal for each path secret's recipient and each new member.
func commitWork(tb testing.TB, g *benchGroup, o CommitOptions) work {
	c, err := g.member(tb, 0).Commit(nil, o)
	must(tb, err)
	w := work{sign: 2}
	if p := c.content.Content.Commit.Path; p != nil {
		w.sign++
		w.derive = float64(1 + len(p.Nodes))
		for _, n := range p.Nodes {
			w.seal += float64(len(n.Secrets))
		}
	}
	if c.Welcome() != nil {
		w.seal += float64(len(c.Welcome().Secrets))
	}
	return w
}

func addWork(o CommitOptions) func(tb testing.TB, g *benchGroup) work {
	return func(tb testing.TB, g *benchGroup) work {
		o := o
		o.Proposals = []Proposal{add(benchMembersOf(tb, g, 1)[0].kp)}
		return commitWork(tb, g, o)
	}
}

// processWork counts what processing an update of leaf 0 needs: the signatures of the commit and of the leaf, one
// decryption, and the key pairs from the common ancestor up.
func processWork(leaves func(g *benchGroup) []LeafIndex) func(tb testing.TB, g *benchGroup) work {
	return func(_ testing.TB, g *benchGroup) work {
		path, _ := g.tree.filteredDirectPath(0)
		w := work{verify: 2, open: 1}
		for _, i := range leaves(g) {
			for _, n := range path {
				if n.covers(i) {
					w.derive += 1 / float64(len(leaves(g)))
				}
			}
		}
		return w
	}
}

var tableRows = []tableRow{
	{"KeyPackage", "KeyPackage", sizes(2), func(testing.TB, *benchGroup) work { return work{derive: 2, sign: 2} }},
	{"Update", "update: create and merge", allSizes, func(tb testing.TB, g *benchGroup) work { return commitWork(tb, g, CommitOptions{}) }},
	{"ProcessUpdate", "process an update, mean", allSizes, processWork(spread)},
	{"ProcessUpdateNearest", "process an update, nearest", allSizes, processWork(func(*benchGroup) []LeafIndex { return []LeafIndex{1} })},
	{"Add", "add one: path, Welcome", allSizes, addWork(CommitOptions{ForcePath: true})},
	{"AddWithoutPath", "add one: Welcome", allSizes, addWork(CommitOptions{})},
	{"AddAll", "add all others at once: path, Welcome", sizes(2, 10, 100, 1_000, 10_000), func(_ testing.TB, g *benchGroup) work {
		depth := 0
		for n := slotsFor(uint32(g.n)); n > 1; n /= 2 {
			depth++
		}
		return work{sign: 3, derive: float64(1 + depth), seal: float64(g.n - 1)}
	}},
	{"Join", "join", allSizes, func(_ testing.TB, g *benchGroup) work { // every leaf's signature, the GroupInfo's; the secrets
		w := work{verify: float64(g.n + 2), open: 1}
		if g.x509 {
			w.ecdsa = float64(g.n + 2) // every certificate, one intermediate
		}
		return w
	}},
	{"Send", "send 100 B", allSizes, func(testing.TB, *benchGroup) work { return work{sign: 1, aead: 2} }},
	{"Receive", "receive 100 B", allSizes, func(testing.TB, *benchGroup) work { return work{verify: 1, aead: 2} }},
	{"Follow", "server follows an update", allSizes, func(testing.TB, *benchGroup) work { return work{verify: 3} }},
	{"Save", "save all", allSizes, nil},
	{"Load", "load", allSizes, nil},
}

// sizes are groups with basic credentials and full trees.
func sizes(n ...int) func(bool) []benchKind {
	return func(short bool) []benchKind {
		var kinds []benchKind
		for _, n := range n {
			if n <= 1_000 || !short {
				kinds = append(kinds, benchKind{n, fullTree, false, 0})
			}
		}
		return kinds
	}
}

// allSizes adds fresh trees and X.509 chains.
func allSizes(short bool) []benchKind {
	var kinds []benchKind
	for _, k := range benchKinds(short) {
		if !k.x509 || k.shape == fullTree && k.n >= 100 {
			kinds = append(kinds, k)
		}
	}
	return kinds
}

// The post-quantum part is one suite, and groups of one size: what its arithmetic and its lengths do to the same code.
const postQuantumSuite = MLKEM768_AES256GCM_SHA384_MLDSA65

// postQuantumRows are some of tableRows, with X.509 chains where certificates count.
func postQuantumRows() (rows []tableRow) {
	kind := benchKind{100, fullTree, false, postQuantumSuite}
	chains := kind
	chains.x509 = true
	for _, row := range tableRows {
		switch row.op {
		case "Update", "Join":
			row.kinds = func(bool) []benchKind { return []benchKind{kind, chains} }
		case "ProcessUpdate", "Send", "Receive":
			row.kinds = func(bool) []benchKind { return []benchKind{kind} }
		default:
			continue
		}
		rows = append(rows, row)
	}
	return rows
}

// result is what was measured.
type result struct {
	oneCore, twoCores time.Duration
	work              *work
	wire, stored      int
	allocs, bytes     uint64
}

type table struct {
	primitives primitives
	results    map[string]*result // by operation and kind
	live, peak int64              // bytes of a group, and while joining it

	postQuantum primitives
	treeBytes   int
	out         io.Writer
}

func processorTime() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// fastest returns the mean of the fastest of several rounds by the clock.
func fastest(clock func() time.Duration, prepare, run func()) time.Duration {
	const round, budget = 10 * time.Millisecond, 250 * time.Millisecond
	began := time.Now() // preparing may take long
	best := time.Duration(1<<63 - 1)
	var spent time.Duration
	for rounds := 0; rounds < 3 || spent < budget && time.Since(began) < 2*time.Second; rounds++ {
		var d time.Duration
		n := 0
		for ; d < round; n++ {
			if prepare != nil {
				prepare()
			}
			start := clock()
			run()
			d += clock() - start
		}
		spent += d
		best = min(best, d/time.Duration(n))
	}
	return best
}

func (p *primitives) measure(cs CipherSuite) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	keep := func(p *time.Duration, run func()) {
		const batch = 16 // the clock is coarse
		d := fastest(processorTime, nil, func() {
			for range batch {
				run()
			}
		}) / batch
		if *p == 0 || d < *p {
			*p = d
		}
	}
	check := func(ok bool, err error) {
		if !ok || err != nil {
			panic(fmt.Sprint("primitive fails: ", err))
		}
	}
	rand, msg := seededRand(1), make([]byte, 300)
	scheme := cs.params().sig
	signer, err := cs.GenerateSignatureKey(rand)
	check(true, err)
	sigKey, err := cs.SignaturePublicKey(signer.Public())
	check(true, err)
	sig, err := scheme.sign(rand, signer, msg)
	check(true, err)
	pub, priv, err := cs.GenerateHPKEKey(rand)
	check(true, err)
	info := cs.hpkeRawInfo(msg)
	ct, err := cs.hpkeSeal(rand, pub, info, msg[:32])
	check(true, err)
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand)
	check(true, err)
	ecSig, err := ecdsa.SignASN1(rand, ec, msg[:32])
	check(true, err)
	keep(&p.sign, func() { _, err := scheme.sign(rand, signer, msg); check(true, err) })
	keep(&p.verify, func() {
		key, err := scheme.parse(sigKey)
		check(err == nil && scheme.verify(key, msg, sig), err)
	})
	keep(&p.seal, func() { _, err := cs.hpkeSeal(rand, pub, info, msg[:32]); check(true, err) })
	keep(&p.open, func() { _, err := cs.hpkeOpen(priv, pub, info, ct); check(true, err) })
	keep(&p.derive, func() { _, _, err := cs.DeriveHPKEKey(msg[:32]); check(true, err) })
	keep(&p.aead, func() { _, err := cs.aeadSeal(msg[:cs.aeadKeySize()], msg[:12], nil, msg[:256]); check(true, err) })
	keep(&p.ecdsa, func() { check(ecdsa.VerifyASN1(&ec.PublicKey, msg[:32], ecSig), nil) })
}

func resultKey(op string, k benchKind) string { return op + "/" + k.String() }

func (tab *table) measure(t *testing.T, row tableRow, k benchKind) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(0))
	g := benchGroupOf(t, k)
	r := new(result)
	tab.results[resultKey(row.op, k)] = r
	if row.work != nil {
		w := row.work(t, g)
		r.work = &w
	}
	for _, op := range benchOps {
		if op.name != row.op {
			continue
		}
		prepare, run := op.setup(t, g)
		if prepare == nil {
			prepare = func() {}
		}
		for range 2 { // the second has warm caches
			prepare()
			var stored countingBatch
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			r.wire = run(&stored)
			runtime.ReadMemStats(&after)
			r.stored, r.allocs, r.bytes = stored.bytes, after.Mallocs-before.Mallocs, after.TotalAlloc-before.TotalAlloc
		}
		runtime.GC()
		runtime.GOMAXPROCS(1)
		r.oneCore = fastest(processorTime, prepare, func() { run(discard{}) })
		runtime.GOMAXPROCS(2)
		start := time.Now()
		r.twoCores = fastest(func() time.Duration { return time.Since(start) }, prepare, func() { run(discard{}) })
	}
}

// measureMemory measures what a group keeps on the heap, and the most that there is while a member joins it.
func (tab *table) measureMemory(t *testing.T, n int) {
	heap := func() int64 {
		s := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
		metrics.Read(s)
		return int64(s[0].Value.Uint64())
	}
	collect := func() int64 { runtime.GC(); runtime.GC(); return heap() }
	j := newBenchJoin(t, benchGroupOf(t, benchKind{n, fullTree, false, 0}))
	tab.treeBytes = len(j.tree)
	defer debug.SetGCPercent(debug.SetGCPercent(2)) // so that little garbage counts
	before := collect()
	done, peak := make(chan bool), make(chan int64)
	go func() {
		highest := int64(0)
		for {
			select {
			case <-done:
				peak <- highest
				return
			default:
				highest = max(highest, heap())
				time.Sleep(50 * time.Microsecond)
			}
		}
	}()
	m := j.join(t, nil)
	close(done)
	tab.peak = <-peak - before
	tab.live = collect() - before
	runtime.KeepAlive(m)
	runtime.KeepAlive(j)
}

// goal is a line of what the package wants to reach.
type goal struct {
	what string
	op   string
	kind benchKind
	time time.Duration // 0: ratio
	two  bool          // on two cores
	over float64       // the limit's multiple
}

func goals(short bool) []goal {
	full := func(n int) benchKind { return benchKind{n, fullTree, false, 0} }
	fresh := func(n int) benchKind { return benchKind{n, freshTree, false, 0} }
	ms := func(f float64) time.Duration { return time.Duration(f * float64(time.Millisecond)) }
	all := []goal{
		{"update: create and merge", "Update", full(100), 0, false, 1.5},
		{"", "Update", full(1_000), 0, false, 1.5},
		{"", "Update", full(10_000), 0, false, 1.5},
		{"process an update, mean", "ProcessUpdate", full(1_000), ms(0.3), false, 0},
		{"", "ProcessUpdate", full(10_000), ms(0.3), false, 0},
		{"join", "Join", full(1_000), ms(35), true, 0},
		{"join, fresh tree", "Join", fresh(1_000), ms(35), true, 0},
		{"", "Join", fresh(10_000), ms(350), true, 0},
		{"add one, path and Welcome", "Add", full(1_000), ms(3), false, 0},
		{"add 999 at once", "AddAll", full(1_000), ms(60), true, 0},
		{"send 100 B", "Send", full(2), ms(0.033), false, 0},
		{"", "Send", full(1_000), ms(0.033), false, 0},
		{"", "Send", full(10_000), ms(0.033), false, 0},
		{"receive 100 B", "Receive", full(2), ms(0.062), false, 0},
		{"", "Receive", full(1_000), ms(0.062), false, 0},
		{"", "Receive", full(10_000), ms(0.062), false, 0},
	}
	var out []goal
	for _, g := range all {
		if g.kind.n <= 1_000 || !short {
			out = append(out, g)
		}
	}
	return out
}

func yes(ok bool) string {
	if ok {
		return "yes"
	}
	return "no"
}

func duration(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return fmt.Sprintf("%.3g µs", float64(d)/1e3)
	default:
		return fmt.Sprintf("%.3g ms", float64(d)/1e6)
	}
}

func count(n int) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// print prints Markdown.
func (tab *table) print(short bool) {
	p := tab.primitives
	printf := func(format string, args ...any) { _, _ = fmt.Fprintf(tab.out, format, args...) }
	printf("Primitives: Ed25519 sign %s, verify %s; HPKE seal %s, open %s, DeriveKeyPair %s; AES-GCM 256 B %s; ECDSA P-256 verify %s.\n\n",
		duration(p.sign), duration(p.verify), duration(p.seal), duration(p.open), duration(p.derive), duration(p.aead), duration(p.ecdsa))
	printf("| operation | members | limit | goal | measured | ratio to limit | met |\n| --- | --- | --- | --- | --- | --- | --- |\n")
	what := ""
	for _, g := range goals(short) {
		if g.what != "" {
			what = g.what
		}
		r := tab.results[resultKey(g.op, g.kind)]
		limit := r.work.limit(p)
		measured, cores := r.oneCore, ""
		if g.two {
			measured, cores = r.twoCores, " on two cores"
		}
		goal := duration(g.time) + cores
		met := measured <= g.time
		if g.time == 0 {
			goal, met = fmt.Sprintf("%.1f × limit", g.over), float64(measured) <= g.over*float64(limit)
		}
		printf("| %s | %s | %s | %s | %s | %.2f | %s |\n", what, count(g.kind.n), duration(limit), goal, duration(measured), float64(measured)/float64(limit), yes(met))
	}
	printf("| memory of a group | 1,000 | %.2f MB | 0.5 MB | %.2f MB, %.2f MB while joining | %.2f | %s |\n\n", float64(tab.treeBytes)/1e6,
		float64(tab.live)/1e6, float64(tab.peak)/1e6, float64(tab.live)/float64(tab.treeBytes), yes(tab.live <= 500_000))
	tab.printCells("one core, and ratio to the limit", short, func(r *result) string {
		if r.work == nil {
			return duration(r.oneCore)
		}
		return fmt.Sprintf("%s, %.2f", duration(r.oneCore), float64(r.oneCore)/float64(r.work.limit(p)))
	})
	tab.printCells("two cores", short, func(r *result) string { return duration(r.twoCores) })
	tab.printCells("bytes on the wire / in the store / allocated in how many pieces", short, func(r *result) string {
		return fmt.Sprintf("%s / %s / %s in %s", count(r.wire), count(r.stored), count(int(r.bytes)), count(int(r.allocs)))
	})
	tab.printPostQuantum(printf)
}

func (tab *table) printPostQuantum(printf func(string, ...any)) {
	p := tab.postQuantum
	printf("%v: sign %s, verify %s; HPKE seal %s, open %s, DeriveKeyPair %s.\n\n", postQuantumSuite,
		duration(p.sign), duration(p.verify), duration(p.seal), duration(p.open), duration(p.derive))
	printf("| post-quantum, 100 members | limit | one core | ratio | two cores | on the wire | in the store |\n" +
		"| --- | --- | --- | --- | --- | --- | --- |\n")
	for _, row := range postQuantumRows() {
		for _, k := range row.kinds(false) {
			r, name := tab.results[resultKey(row.op, k)], row.title
			if k.x509 {
				name += "; X.509"
			}
			limit := r.work.limit(p)
			printf("| %s | %s | %s | %.2f | %s | %s | %s |\n", name, duration(limit), duration(r.oneCore),
				float64(r.oneCore)/float64(limit), duration(r.twoCores), count(r.wire), count(r.stored))
		}
	}
}

func (tab *table) printCells(title string, short bool, cell func(*result) string) {
	columns := []int{2, 10, 100, 1_000, 10_000}
	if short {
		columns = columns[:4]
	}
	var b strings.Builder
	fmt.Fprintf(&b, "| %s |", title)
	for _, n := range columns {
		fmt.Fprintf(&b, " %s |", count(n))
	}
	b.WriteString("\n|" + strings.Repeat(" --- |", 1+len(columns)) + "\n")
	for _, row := range tableRows {
		for _, variant := range []benchKind{{0, fullTree, false, 0}, {0, freshTree, false, 0}, {0, fullTree, true, 0}} {
			name := row.title
			if variant.shape == freshTree {
				name += "; fresh tree"
			}
			if variant.x509 {
				name += "; X.509"
			}
			line, any := "| "+name+" |", false
			for _, n := range columns {
				variant.n = n
				c := ""
				if r := tab.results[resultKey(row.op, variant)]; r != nil {
					c, any = cell(r), true
				}
				line += " " + c + " |"
			}
			if any {
				b.WriteString(line + "\n")
			}
		}
	}
	_, _ = fmt.Fprintln(tab.out, b.String())
}
