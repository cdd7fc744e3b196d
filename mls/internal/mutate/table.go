package main

import (
	"bufio"
	"fmt"
	"os"
	"strings"
)

// table is guards.txt: a line for each guard with its id, a tab and the name of the test that fails without it. A third
// column names another guard that catches the same: the test fails only without both. The test "-" says that none can,
// and the third column why.
type table struct {
	lines map[string]line
	order []string
}

type line struct{ test, with, note string }

const exempt = "-"

func readTable(name string) (*table, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	t := &table{lines: make(map[string]line)}
	in := bufio.NewScanner(f)
	for in.Scan() {
		if in.Text() == "" || strings.HasPrefix(in.Text(), "#") {
			continue
		}
		cols := strings.Split(in.Text(), "\t")
		if len(cols) < 2 || len(cols) > 3 || cols[1] == "" {
			return nil, fmt.Errorf("%s: line %q", name, in.Text())
		}
		l := line{test: cols[1]}
		switch {
		case len(cols) == 3 && l.test == exempt:
			l.note = cols[2]
		case len(cols) == 3:
			l.with = cols[2]
		case l.test == exempt:
			return nil, fmt.Errorf("%s: %q has neither a test nor a reason", name, cols[0])
		}
		if _, twice := t.lines[cols[0]]; twice {
			return nil, fmt.Errorf("%s: two lines for %q", name, cols[0])
		}
		t.lines[cols[0]] = l
		t.order = append(t.order, cols[0])
	}
	return t, in.Err()
}

// compare returns the guards without a line and the lines without a guard, of the package whose ids begin with prefix.
func (t *table) compare(src *source, prefix string) (missing, stale []string) {
	have := make(map[string]bool)
	for _, g := range src.guards {
		have[g.id] = true
		if _, ok := t.lines[g.id]; !ok {
			missing = append(missing, g.id)
		}
	}
	for _, id := range t.order {
		if strings.HasPrefix(id, "codec.") == (prefix == "codec.") && !have[id] {
			stale = append(stale, id)
		}
	}
	return missing, stale
}
