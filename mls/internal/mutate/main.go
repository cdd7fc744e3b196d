// Mutate shows that the tests of package mls notice the loss of each of its guards, and those of node and federation the
// loss of what stops hostile nodes. It builds the tests of the package
// once with a switch at each guard, the working tree stays as it is, and runs for each guard, switched off, the test
// that guards.txt names; the test has to fail. A guard whose loss goes unnoticed is a failure.
//
//	go run ./mls/internal/mutate [-run pattern] [-p 2] [-timeout 1m]
//	go run ./mls/internal/mutate -find [-run pattern]
//	go run ./mls/internal/mutate -hostile [-run pattern]
//	go run ./mls/internal/mutate -list node
//
// With -find it looks for a test for each guard that has none, and prints the lines that guards.txt lacks. With -hostile it
// does the same for the rows of hostile.txt: what hostile nodes try on other nodes and clients, and what stops them. With
// -list it prints the guards of one of those packages.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

func main() {
	pattern := flag.String("run", "", "only guards whose line matches")
	parallel := flag.Int("p", 2, "tests at once")
	timeout := flag.Duration("timeout", time.Minute, "bound of each test, which counts as failed past it")
	find := flag.Bool("find", false, "look for tests of guards that have none")
	verbose := flag.Bool("v", false, "print a line for each guard")
	hostile := flag.Bool("hostile", false, "the table of hostile nodes instead of the guards of mls")
	list := flag.String("list", "", "print the guards of that package of the table of hostile nodes")
	flag.Parse()
	if *list != "" || *hostile {
		if err := runHostile(*list, *pattern, *parallel, *timeout, *verbose); err != nil {
			fmt.Fprintln(os.Stderr, "mutate:", err)
			os.Exit(1)
		}
		return
	}
	if err := run(*pattern, *parallel, *timeout, *find, *verbose); err != nil {
		fmt.Fprintln(os.Stderr, "mutate:", err)
		os.Exit(1)
	}
}

// packages are those whose guards are switched, with what comes before the ids of theirs.
var packages = []struct{ dir, prefix string }{{"mls", ""}, {"mls/codec", "codec."}}

const tableFile = "mls/internal/mutate/guards.txt"

func run(pattern string, parallel int, timeout time.Duration, find, verbose bool) error {
	only, err := regexp.Compile(pattern)
	if err != nil {
		return err
	}
	table, err := readTable(tableFile)
	if err != nil {
		return err
	}
	tmp, err := os.MkdirTemp("", "mutate")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	total := 0
	var bad []string
	for _, p := range packages {
		src, err := findGuards(p.dir, p.prefix)
		if err != nil {
			return err
		}
		if missing, stale := table.compare(src, p.prefix); !find && len(missing)+len(stale) > 0 {
			return fmt.Errorf("%s isn't complete: guards without a line %q, lines without a guard %q", tableFile, missing, stale)
		}
		b, err := build(src, tmp, timeout)
		if err != nil {
			return err
		}
		if find {
			if err := b.find(table, only, parallel); err != nil {
				return err
			}
			continue
		}
		n, survivors, err := b.check(table, only, parallel, verbose)
		if err != nil {
			return err
		}
		total += n
		bad = append(bad, survivors...)
	}
	if find {
		return nil
	}
	for _, s := range bad {
		fmt.Println("SURVIVED", s)
	}
	fmt.Printf("%d guards: %d killed by their test, %d survived\n", total, total-len(bad), len(bad))
	if len(bad) > 0 {
		return errors.New("a guard can go without a test that notices")
	}
	return nil
}

// binary is the test binary of an instrumented package.
type binary struct {
	src     *source
	path    string
	numbers map[string]int // by id
	timeout time.Duration
}

func build(src *source, tmp string, timeout time.Duration) (*binary, error) {
	name := filepath.Base(src.dir)
	overlay := map[string]map[string]string{"Replace": {}}
	for path, text := range src.files {
		to := filepath.Join(tmp, name+"_"+filepath.Base(path))
		if err := os.WriteFile(to, text, 0o666); err != nil {
			return nil, err
		}
		overlay["Replace"][path] = to
	}
	j, err := json.Marshal(overlay)
	if err != nil {
		return nil, err
	}
	file := filepath.Join(tmp, name+".json")
	if err := os.WriteFile(file, j, 0o666); err != nil {
		return nil, err
	}
	b := &binary{src: src, path: filepath.Join(tmp, name+".test"), numbers: make(map[string]int), timeout: timeout}
	for _, g := range src.guards {
		b.numbers[g.id] = g.n
	}
	cmd := exec.Command("go", "test", "-c", "-vet=off", "-overlay", file, "-o", b.path, "./"+src.dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the tests of %s: %w\n%s", src.dir, err, out)
	}
	return b, nil
}

// test runs one test, or all if name is empty, with guards switched off.
func (b *binary) test(name, trace string, off ...int) (passed bool, out []byte, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), b.timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, b.path, "-test.v", "-test.count=1")
	if name != "" {
		cmd.Args = append(cmd.Args, "-test.run", testPattern(name))
	}
	var list []string
	for _, n := range off {
		list = append(list, strconv.Itoa(n))
	}
	cmd.Dir = b.src.dir
	cmd.Env = append(os.Environ(), "GUARDS_OFF="+strings.Join(list, " "), "GUARDS_TRACE="+trace)
	out, err = cmd.CombinedOutput()
	if err == nil {
		if name != "" && !bytes.Contains(out, []byte("--- PASS: "+spell(name)+" ")) {
			return false, out, fmt.Errorf("there is no test %q", name)
		}
		return true, out, nil
	}
	if exit := new(exec.ExitError); errors.As(err, &exit) || ctx.Err() != nil {
		return false, out, nil
	}
	return false, out, err
}

// spell writes the name of a test as package testing does.
func spell(name string) string { return strings.ReplaceAll(name, " ", "_") }

func testPattern(name string) string {
	parts := strings.Split(spell(name), "/")
	for i, p := range parts {
		parts[i] = "^" + regexp.QuoteMeta(p) + "$"
	}
	return strings.Join(parts, "/")
}

// check switches each guard off and runs its test.
func (b *binary) check(table *table, only *regexp.Regexp, parallel int, verbose bool) (int, []string, error) {
	type job struct {
		g guard
		l line
	}
	var jobs []job
	tests := make(map[string]bool)
	for _, g := range b.src.guards {
		l := table.lines[g.id]
		if !only.MatchString(g.id + "\t" + l.test) {
			continue
		}
		if l.test == exempt {
			fmt.Printf("not switched: %s: %s\n", g.id, l.note)
			continue
		}
		jobs = append(jobs, job{g, l})
		tests[l.test] = true
	}
	var mu sync.Mutex
	var survivors []string
	var failed error
	fail := func(err error) { mu.Lock(); defer mu.Unlock(); failed = errors.Join(failed, err) }
	work(parallel, slices.Collect(func(yield func(string) bool) {
		for t := range tests {
			if !yield(t) {
				return
			}
		}
	}), func(t string) {
		if ok, out, err := b.test(t, ""); err != nil {
			fail(err)
		} else if !ok {
			fail(fmt.Errorf("%s fails with all guards:\n%s", t, out))
		}
	})
	if failed != nil {
		return 0, nil, failed
	}
	work(parallel, jobs, func(j job) {
		ok, _, err := b.test(j.l.test, "", j.g.n)
		if err == nil && j.l.with != "" {
			if !ok {
				err = fmt.Errorf("%s: the test notices its loss alone, the line says only with %q", j.g.id, j.l.with)
			} else {
				ok, _, err = b.test(j.l.test, "", j.g.n, b.numbers[j.l.with])
			}
		}
		if err != nil {
			fail(err)
		}
		mu.Lock()
		defer mu.Unlock()
		if ok {
			survivors = append(survivors, j.g.id+"\t"+j.l.test)
		} else if verbose {
			fmt.Printf("killed: %s: %s\n", j.g.id, j.l.test)
		}
	})
	slices.Sort(survivors)
	return len(jobs), survivors, failed
}

// find looks for tests that notice the loss of guards that have no line.
func (b *binary) find(table *table, only *regexp.Regexp, parallel int) error {
	wanted := make(map[int]guard)
	for _, g := range b.src.guards {
		if _, ok := table.lines[g.id]; !ok && only.MatchString(g.id) {
			wanted[g.n] = g
		}
	}
	if len(wanted) == 0 {
		return nil
	}
	out, err := exec.Command(b.path, "-test.list", "^Test").Output()
	if err != nil {
		return err
	}
	reach := make(map[int][]string) // tests in which a guard refuses
	cost := make(map[string]int)
	var mu sync.Mutex
	var failed error
	trace := func(name string) (tests [][]byte) {
		f, err := os.CreateTemp("", "trace")
		if err != nil {
			failed = err
			return nil
		}
		defer os.Remove(f.Name())
		_, out, err := b.test(name, f.Name())
		if err != nil {
			return nil
		}
		text, _ := os.ReadFile(f.Name())
		mu.Lock()
		defer mu.Unlock()
		for _, s := range strings.Fields(string(text)) {
			n, _ := strconv.Atoi(s)
			if _, ok := wanted[n]; ok {
				reach[n] = append(reach[n], name)
				cost[name]++
			}
		}
		return bytes.Split(out, []byte("\n"))
	}
	work(parallel, strings.Fields(string(out)), func(name string) {
		var rows []string
		for _, l := range trace(name) {
			if row, ok := bytes.CutPrefix(l, []byte("=== RUN   ")); ok && bytes.Count(row, []byte("/")) == 1 {
				rows = append(rows, string(row))
			}
		}
		for _, row := range rows {
			trace(row)
		}
	})
	if failed != nil {
		return failed
	}
	work(parallel, b.src.guards, func(g guard) {
		if _, ok := wanted[g.n]; !ok {
			return
		}
		names := reach[g.n]
		slices.SortStableFunc(names, func(x, y string) int { // rows first, the more specific first
			return strings.Count(y, "/")*1e6 - cost[y] - strings.Count(x, "/")*1e6 + cost[x]
		})
		for _, name := range names {
			if ok, _, err := b.test(name, "", g.n); err == nil && !ok {
				fmt.Printf("%s\t%s\n", g.id, name)
				return
			}
		}
		fmt.Printf("%s\tNONE of %d that reach it\n", g.id, len(names))
	})
	return nil
}

// work calls f for each job, so many at once.
func work[T any](parallel int, jobs []T, f func(T)) {
	next := make(chan T)
	var wg sync.WaitGroup
	for range min(max(1, parallel), runtime.NumCPU()) {
		wg.Go(func() {
			for j := range next {
				f(j)
			}
		})
	}
	for _, j := range jobs {
		next <- j
	}
	close(next)
	wg.Wait()
}
