package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"sync"
	"time"
)

// hostilePackages are those of which hostile.txt has guards, with what comes before the ids of theirs.
var hostilePackages = []struct{ dir, prefix string }{
	{"federation", "federation."}, {"node", "node."}, {"node/client", "client."}, {"node/chain", "chain."},
	{"federation/mimi", "mimi."}, {"federation/ohttp", "ohttp."},
}

const hostileFile = "mls/internal/mutate/hostile.txt"

// attempt is a row of hostile.txt: what a hostile node tries, the guard that stops it and the test that fails without it,
// separated by tabs. Guards that each stop it alone are joined by " + ", and are switched off together.
type attempt struct{ what, guard, test string }

func (a attempt) guards() []string { return strings.Split(a.guard, " + ") }

func readAttempts(name string) ([]attempt, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var rows []attempt
	in := bufio.NewScanner(f)
	for in.Scan() {
		if in.Text() == "" || strings.HasPrefix(in.Text(), "#") {
			continue
		}
		cols := strings.Split(in.Text(), "\t")
		if len(cols) != 3 || cols[0] == "" || cols[2] == "" {
			return nil, fmt.Errorf("%s: line %q", name, in.Text())
		}
		rows = append(rows, attempt{cols[0], cols[1], cols[2]})
	}
	return rows, in.Err()
}

// runHostile switches the guard of each row off and runs its test, or lists the guards of a package.
func runHostile(list, pattern string, parallel int, timeout time.Duration, verbose bool) error {
	only, err := regexp.Compile(pattern)
	if err != nil {
		return err
	}
	rows, err := readAttempts(hostileFile)
	if err != nil {
		return err
	}
	tmp, err := os.MkdirTemp("", "mutate")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	total, survived := 0, 0
	for _, p := range hostilePackages {
		if list != "" && list != p.dir {
			continue
		}
		src, err := findGuards(p.dir, p.prefix)
		if err != nil {
			return err
		}
		if list != "" {
			for _, g := range src.guards {
				fmt.Println(g.id)
			}
			return nil
		}
		var own []attempt
		for _, r := range rows {
			if strings.HasPrefix(r.guard, p.prefix) && only.MatchString(r.what+"\t"+r.guard+"\t"+r.test) {
				own = append(own, r)
			}
		}
		if len(own) == 0 {
			continue
		}
		b, err := build(src, tmp, timeout)
		if err != nil {
			return err
		}
		n, err := b.attempts(own, parallel, verbose)
		if err != nil {
			return err
		}
		total += len(own)
		survived += n
	}
	if list != "" {
		return fmt.Errorf("no package %s", list)
	}
	fmt.Printf("%d attempts: %d whose guard is killed by its test, %d survived\n", total, total-survived, survived)
	if survived > 0 {
		return errors.New("a guard can go without a test that notices")
	}
	return nil
}

// attempts returns how many rows' tests don't notice the loss of their guards.
func (b *binary) attempts(rows []attempt, parallel int, verbose bool) (survived int, err error) {
	var mu sync.Mutex
	good := make(map[string]bool) // tests that pass with all guards
	work(parallel, rows, func(r attempt) {
		mu.Lock()
		passes := good[r.test]
		mu.Unlock()
		var failed error
		var numbers []int
		for _, g := range r.guards() {
			if b.numbers[g] == 0 {
				failed = fmt.Errorf("there is no guard %q", g)
			}
			numbers = append(numbers, b.numbers[g])
		}
		if failed == nil && !passes {
			var out []byte
			if passes, out, failed = b.test(r.test, ""); failed == nil && !passes {
				failed = fmt.Errorf("%s fails with all guards:\n%s", r.test, out)
			}
		}
		notices := false
		if failed == nil {
			passes, _, failed = b.test(r.test, "", numbers...)
			notices = !passes
		}
		mu.Lock()
		defer mu.Unlock()
		good[r.test] = true
		switch {
		case failed != nil:
			err = errors.Join(err, failed)
		case !notices:
			survived++
			fmt.Printf("SURVIVED %s: %s: %s\n", r.what, r.guard, r.test)
		case verbose:
			fmt.Printf("killed: %s: %s: %s\n", r.what, r.guard, r.test)
		}
	})
	return survived, err
}
