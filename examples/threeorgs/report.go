package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"
)

// A report prints each step as it ends, for people or as JSON lines.
type report struct {
	out    io.Writer
	json   bool
	passed int
	failed int
}

// stepLine is the JSON form of a step.
type stepLine struct {
	Step   string `json:"step"`
	OK     bool   `json:"ok"`
	MS     int64  `json:"ms"`
	Detail string `json:"detail"`
}

// step prints the outcome of one step. lines are what the audience sees below it, such as a transcript.
func (r *report) step(name string, took time.Duration, detail string, lines []string, err error) {
	if err != nil {
		r.failed++
		detail = err.Error()
	} else {
		r.passed++
	}
	if r.json {
		b, _ := json.Marshal(stepLine{name, err == nil, took.Milliseconds(), detail})
		fmt.Fprintf(r.out, "%s\n", b)
		return
	}
	mark := "ok  "
	if err != nil {
		mark = "FAIL"
	}
	fmt.Fprintf(r.out, "%s %-11s %6d ms  %s\n", mark, name, took.Milliseconds(), detail)
	for _, l := range lines {
		fmt.Fprintf(r.out, "       %s\n", l)
	}
}

// end prints the sum and says whether all is well.
func (r *report) end() bool {
	if !r.json {
		fmt.Fprintf(r.out, "%d of %d checks passed\n", r.passed, len(steps))
	} else {
		b, _ := json.Marshal(stepLine{"end", r.passed == len(steps), 0, fmt.Sprintf("%d of %d checks passed", r.passed, len(steps))})
		fmt.Fprintf(r.out, "%s\n", b)
	}
	return r.passed == len(steps)
}

func short(b []byte) string {
	s := fmt.Sprintf("%x", b)
	return s[:min(16, len(s))]
}

func quoted(ss []string) string { return strings.Join(ss, " | ") }
