package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A result is one figure of a workload.
type result struct {
	Workload string  `json:"workload"`
	Scale    string  `json:"scale"` // what was varied, such as "U=30"
	Figure   string  `json:"figure"`
	Value    float64 `json:"value"`
	Unit     string  `json:"unit"`
}

// report prints results as they come: as JSON lines, or as a table of one line each.
type report struct {
	out    io.Writer
	json   bool
	headed bool
}

func (r *report) add(workload, scale, figure string, value float64, unit string) {
	if r.json {
		line, _ := json.Marshal(result{workload, scale, figure, value, unit}) // strings and a finite number always encode
		fmt.Fprintf(r.out, "%s\n", line)
		return
	}
	if !r.headed {
		fmt.Fprintf(r.out, "%-11s %-14s %-36s %12s %s\n", "workload", "scale", "figure", "value", "unit")
		r.headed = true
	}
	digits := max(0, 3-int(math.Floor(math.Log10(math.Max(math.Abs(value), 1e-4))))-1)
	fmt.Fprintf(r.out, "%-11s %-14s %-36s %12s %s\n", workload, scale, figure, strconv.FormatFloat(value, 'f', min(digits, 4), 64), unit)
}

func (r *report) end() {
	if !r.json && !r.headed {
		fmt.Fprintln(r.out, "nothing measured")
	}
}

// percentiles adds the 50th, 90th and 99th percentile of times, and how many they are.
func (r *report) percentiles(workload, scale, figure string, times []time.Duration) {
	if len(times) == 0 {
		return
	}
	slices.Sort(times)
	for _, p := range []int{50, 90, 99} {
		at := min(len(times)-1, len(times)*p/100)
		r.add(workload, scale, fmt.Sprintf("%s p%d of %d", figure, p, len(times)), float64(times[at])/1e6, "ms")
	}
}

// cpuTime is the processor time that a process has used, user and system (proc(5): utime and stime, in ticks of 10 ms).
func cpuTime(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("processor time: %w", err)
	}
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(fields) < 13 {
		return 0, fmt.Errorf("processor time: /proc/%d/stat has %d fields", pid, len(fields))
	}
	var ticks time.Duration
	for _, f := range fields[11:13] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("processor time: %w", err)
		}
		ticks += time.Duration(n)
	}
	return ticks * 10 * time.Millisecond, nil
}

// memory adds what the nodes have in memory, and how much of it is theirs alone: the program's own pages are shared.
func (r *report) memory(workload, scale string, u used) {
	r.add(workload, scale, "memory of the nodes", float64(u.memory)/(1<<20), "MiB")
	r.add(workload, scale, "of it without the program", float64(u.private)/(1<<20), "MiB")
}

// residentBytes is the memory of a process, and what of it isn't pages of files (proc(5): VmRSS, RssAnon).
func residentBytes(pid int) (all, private int64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0, fmt.Errorf("memory: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		name, rest, _ := strings.Cut(line, ":")
		if name != "VmRSS" && name != "RssAnon" {
			continue
		}
		kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
		if err != nil {
			return 0, 0, fmt.Errorf("memory: %w", err)
		}
		if name == "VmRSS" {
			all = kib << 10
		} else {
			private = kib << 10
		}
	}
	if all == 0 || private == 0 {
		return 0, 0, fmt.Errorf("memory: /proc/%d/status has no VmRSS or RssAnon", pid)
	}
	return all, private, nil
}
