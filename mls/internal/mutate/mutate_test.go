package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"strings"
	"testing"
)

// TestEveryGuardHasATest keeps guards.txt complete: a line for each guard of the source, a guard for each line, and a test
// function in each. That the test fails without the guard is what the command shows.
func TestEveryGuardHasATest(t *testing.T) {
	table, err := readTable("guards.txt")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range packages {
		dir := filepath.Join("..", "..", "..", p.dir)
		src, err := findGuards(dir, p.prefix)
		if err != nil {
			t.Fatal(err)
		}
		missing, stale := table.compare(src, p.prefix)
		for _, id := range missing {
			t.Errorf("no line for the guard\n%s\nA line names its test; go run ./mls/internal/mutate -find looks for one.", id)
		}
		for _, id := range stale {
			t.Errorf("no guard for the line\n%s", id)
		}
		tests := testFunctions(t, dir)
		for _, g := range src.guards {
			l := table.lines[g.id]
			if name, _, _ := strings.Cut(l.test, "/"); name != exempt && name != "" && !tests[name] {
				t.Errorf("%s: there is no %s", g.id, name)
			}
			if _, ok := table.lines[l.with]; l.with != "" && !ok {
				t.Errorf("%s: there is no guard %q", g.id, l.with)
			}
		}
	}
}

// TestEveryAttemptHasAGuardAndATest keeps hostile.txt true, as far as the source says.
func TestEveryAttemptHasAGuardAndATest(t *testing.T) {
	rows, err := readAttempts("hostile.txt")
	if err != nil {
		t.Fatal(err)
	}
	guards, tests := make(map[string]bool), make(map[string]bool)
	for _, p := range hostilePackages {
		dir := filepath.Join("..", "..", "..", p.dir)
		src, err := findGuards(dir, p.prefix)
		if err != nil {
			t.Fatal(err)
		}
		for _, g := range src.guards {
			guards[g.id] = true
		}
		for name := range testFunctions(t, dir) {
			tests[p.prefix+name] = true
		}
	}
	for _, r := range rows {
		for _, g := range r.guards() {
			if !guards[g] {
				t.Errorf("%s: there is no guard %q", r.what, g)
			}
		}
		name, _, _ := strings.Cut(r.test, "/")
		if prefix, _, _ := strings.Cut(r.guard, "."); !tests[prefix+"."+name] {
			t.Errorf("%s: there is no %s", r.what, name)
		}
	}
	if len(rows) < 50 {
		t.Errorf("the table has %d rows", len(rows))
	}
}

func testFunctions(t *testing.T, dir string) map[string]bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	tests := make(map[string]bool)
	for _, name := range files {
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range file.Decls {
			if fd, ok := d.(*ast.FuncDecl); ok && fd.Recv == nil && strings.HasPrefix(fd.Name.Name, "Test") {
				tests[fd.Name.Name] = true
			}
		}
	}
	return tests
}
