package mimi

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestTableOfEndpointsIsWhole reads the table in the package's documentation: it has every endpoint of the directory, the
// directory and the gateway, and the functions and tests that it names are there.
func TestTableOfEndpointsIsWhole(t *testing.T) {
	source, err := os.ReadFile("mimi.go")
	if err != nil {
		t.Fatal(err)
	}
	doc, err := json.Marshal(NewDirectory("alpha.example"))
	if err != nil {
		t.Fatal(err)
	}
	missing := make(map[string]any)
	if err := json.Unmarshal(doc, &missing); err != nil {
		t.Fatal(err)
	}
	if n := len(missing); n != 10 {
		t.Errorf("the directory has %d endpoints, the draft 10", n)
	}
	missing["directory"], missing["ohttpGateway"] = nil, nil
	has := func(file, function string) bool {
		text, err := os.ReadFile(filepath.Join("..", "..", file))
		return err == nil && regexp.MustCompile(`(?m)^func (\([^)]*\) )?`+regexp.QuoteMeta(function)+`\(`).Match(text)
	}
	last := ""
	for _, line := range bytes.Split(source, []byte("\n")) {
		cells := strings.Fields(strings.TrimPrefix(string(line), "//\t"))
		if !bytes.HasPrefix(line, []byte("//\t")) || len(cells) != 6 || cells[0] == "endpoint" {
			continue
		}
		if _, ok := missing[cells[0]]; !ok {
			t.Errorf("%s isn't in the directory, or is in the table twice", cells[0])
		}
		delete(missing, cells[0])
		if !regexp.MustCompile(`^5\.\d+(\.\d+)?$`).MatchString(cells[1]) {
			t.Errorf("%s is in section %q", cells[0], cells[1])
		}
		number := strings.Split(cells[1], ".")
		order := fmt.Sprintf("%3s", number[1]) + strings.Join(number[2:], ".")
		if order < last || order == last && cells[0] != "updateConsent" {
			t.Errorf("%s, of section %s, isn't in the draft's order, or has the section of another", cells[0], cells[1])
		}
		last = order
		if !has(cells[2], cells[3]) {
			t.Errorf("%s: there is no %s in %s", cells[0], cells[3], cells[2])
		}
		if !strings.HasPrefix(cells[5], "Test") || !has(cells[4], cells[5]) {
			t.Errorf("%s: there is no %s in %s", cells[0], cells[5], cells[4])
		}
	}
	for name := range missing {
		t.Errorf("%s isn't in the table", name)
	}
}
