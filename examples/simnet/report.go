//go:build linux

package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// totals are what has been counted since the beginning.
type totals struct {
	acked, delivered, commits, epochs int
	passed, dropped, overtaken        int64 // packets between nodes
}

func (w *world) totals() totals {
	w.mu.Lock()
	defer w.mu.Unlock()
	t := totals{acked: len(w.record.acked)}
	rooms := make(map[string]uint64)
	for p, v := range w.record.views {
		t.delivered += len(v.Messages)
		rooms[p.Room] = max(rooms[p.Room], v.Epoch)
	}
	for _, epoch := range rooms {
		t.epochs += int(epoch)
	}
	for _, epochs := range w.record.commits {
		t.commits += len(epochs)
	}
	for _, s := range w.net.sites {
		t.passed += s.relay.passed.Load()
		t.dropped += s.relay.dropped.Load()
		t.overtaken += s.relay.overtaken.Load()
	}
	return t
}

// table is the counts of the scenarios.
type table struct{ rows [][]string }

// add adds what happened in a scenario. A delivery is a message in a client's view, its sender's included.
func (t *table) add(scenario string, w *world, before, after totals, faults int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var acts []string
	for _, kind := range []string{"kill", "hang", "partition", "weather", "absence", "restart", "step", "step seen"} {
		if n := w.counts[kind]; n > 0 {
			acts = append(acts, fmt.Sprintf("%s %d", kind, n))
		}
	}
	heals := []string{}
	for _, what := range slices.Sorted(maps.Keys(w.heals)) {
		times := slices.Sorted(slices.Values(w.heals[what]))
		heals = append(heals, fmt.Sprintf("%s %s, %s", what, seconds(times[len(times)/2]), seconds(times[len(times)-1])))
	}
	t.rows = append(t.rows, []string{
		scenario, strings.Join(acts, ", "), fmt.Sprint(after.acked - before.acked), fmt.Sprint(w.counts["queued"]),
		fmt.Sprint(after.delivered - before.delivered), fmt.Sprint(after.commits - before.commits), fmt.Sprintf("%d, %d", w.counts["added"], w.counts["removed"]), fmt.Sprint(after.epochs - before.epochs),
		fmt.Sprintf("%d, %d, %d", after.passed-before.passed, after.dropped-before.dropped, after.overtaken-before.overtaken),
		strings.Join(heals, "; "), fmt.Sprint(faults),
	})
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.2f", d.Seconds()) }

func (t *table) print(out io.Writer) {
	if len(t.rows) == 0 {
		return
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\nSCENARIO\tDONE\tACKED\tQUEUED\tDELIVERED\tCOMMITS\tADDED, REMOVED\tEPOCHS\tPACKETS, LOST, OVERTAKEN\tS TO HEAL: MEDIAN, LONGEST\tFAULTS")
	for _, row := range t.rows {
		fmt.Fprintln(w, strings.Join(row, "\t"))
	}
	w.Flush()
}
