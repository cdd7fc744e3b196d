package main

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// A guard is a decision that refuses something: a condition that leads to the return of an error of this package or to a
// failure of a decoder, a comparison of MACs, or a call of a function that has guards and returns nothing but an error.
type guard struct {
	id string // function, error and condition, which survive that the function moves
	n  int    // number in the instrumented binary, from 1
}

// source is a package whose guards can be switched off one at a time: its files, changed, by their absolute path.
type source struct {
	dir    string
	guards []guard
	files  map[string][]byte
}

// switches is the file that the instrumented package gets in addition. A guard that refuses asks guardOff first.
const switches = `package %s

import (
	"os"
	"strconv"
	"strings"
	"sync"
)

var guardsOff = func() map[int]bool {
	m := make(map[int]bool)
	for _, s := range strings.Fields(os.Getenv("GUARDS_OFF")) {
		n, _ := strconv.Atoi(s)
		m[n] = true
	}
	return m
}()

var (
	guardTrace = os.Getenv("GUARDS_TRACE")
	guardsSeen sync.Map
)

func guardOff(n int) bool {
	if guardTrace != "" {
		if _, seen := guardsSeen.LoadOrStore(n, true); !seen {
			f, err := os.OpenFile(guardTrace, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o666)
			if err != nil {
				panic(err)
			}
			_, _ = f.WriteString(strconv.Itoa(n) + "\n")
			_ = f.Close()
		}
	}
	return len(guardsOff) > 0 && guardsOff[n]
}

func guardNil(n int, err error) error {
	if err != nil && guardOff(n) {
		return nil
	}
	return err
}
`

// refusing are functions of other packages that judge outside input, and methods that only forward a judgement.
var refusing = []string{"Unmarshal", "Finish", "Err"}

// making are functions that fail for what the application gave or for want of randomness.
var making = []string{"sign", "signContent", "SignWithLabel", "AddSigner", "describe"}

// coded are functions that make an error of a code, a string or one of federation's constants, in packages node and
// federation, or of a rule in package mimi.
var coded = []string{"refuse", "refusal", "busy", "refuseMessage", "forbidden"}

var sentinel = regexp.MustCompile(`^(Err|err)[A-Z]\w*$`)

type finder struct {
	fset     *token.FileSet
	text     []byte
	fn       string
	refusing map[string]bool // names of functions that have guards
	insert   map[int][]string
	src      *source
	seen     map[string]int
}

// findGuards parses the non-test files of the package in dir and instruments them. Prefix comes before the ids.
func findGuards(dir, prefix string) (*source, error) {
	fset := token.NewFileSet()
	names, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		return nil, err
	}
	src := &source{dir: dir, files: make(map[string][]byte)}
	var files []*ast.File
	texts := make(map[*ast.File][]byte)
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		text, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		file, err := parser.ParseFile(fset, name, text, parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		files = append(files, file)
		texts[file] = text
	}
	f := &finder{fset: fset, src: src, seen: make(map[string]int)}
	f.closure(files)
	for _, file := range files {
		f.text, f.insert = texts[file], make(map[int][]string)
		for _, d := range file.Decls {
			if fd, ok := d.(*ast.FuncDecl); ok && fd.Body != nil {
				f.fn = prefix + funcName(fd)
				f.block(fd.Body, fd.Type, nil)
			}
		}
		if len(f.insert) > 0 {
			path, err := filepath.Abs(fset.Position(file.Pos()).Filename)
			if err != nil {
				return nil, err
			}
			src.files[path] = f.apply()
		}
	}
	path, err := filepath.Abs(filepath.Join(dir, "guard_switches.go"))
	if err != nil {
		return nil, err
	}
	src.files[path] = fmt.Appendf(nil, switches, files[0].Name.Name)
	return src, nil
}

func funcName(fd *ast.FuncDecl) string {
	if fd.Recv == nil {
		return fd.Name.Name
	}
	t := fd.Recv.List[0].Type
	for {
		switch x := t.(type) {
		case *ast.StarExpr:
			t = x.X
		case *ast.IndexExpr:
			t = x.X
		case *ast.Ident:
			return x.Name + "." + fd.Name.Name
		default:
			return fd.Name.Name
		}
	}
}

// closure finds the functions that refuse something, by themselves or through others.
func (f *finder) closure(files []*ast.File) {
	f.refusing = make(map[string]bool)
	for _, name := range refusing {
		f.refusing[name] = true
	}
	for again := true; again; {
		again = false
		for _, file := range files {
			for _, d := range file.Decls {
				fd, ok := d.(*ast.FuncDecl)
				if !ok || fd.Body == nil || !returnsError(fd.Type) || f.refusing[fd.Name.Name] || slices.Contains(making, fd.Name.Name) {
					continue
				}
				ast.Inspect(fd.Body, func(n ast.Node) bool {
					switch s := n.(type) {
					case *ast.FuncLit:
						return false
					case *ast.ReturnStmt:
						if len(s.Results) > 0 && f.refusal(s.Results[len(s.Results)-1]) != "" {
							f.refusing[fd.Name.Name], again = true, true
						}
					case *ast.CallExpr:
						if f.refusing[callee(s)] && !slices.Contains(refusing, callee(s)) {
							f.refusing[fd.Name.Name], again = true, true
						}
					}
					return true
				})
			}
		}
	}
}

func returnsError(t *ast.FuncType) bool {
	if t.Results == nil {
		return false
	}
	last, ok := t.Results.List[len(t.Results.List)-1].Type.(*ast.Ident)
	return ok && last.Name == "error"
}

func onlyError(t *ast.FuncType) bool { return returnsError(t) && t.Results.NumFields() == 1 }

func callee(c *ast.CallExpr) string {
	switch x := c.Fun.(type) {
	case *ast.Ident:
		return x.Name
	case *ast.SelectorExpr:
		return x.Sel.Name
	case *ast.IndexExpr:
		if id, ok := x.X.(*ast.Ident); ok {
			return id.Name
		}
	}
	return ""
}

// refusal describes an expression that makes an error here, or is "".
func (f *finder) refusal(e ast.Expr) string {
	switch x := e.(type) {
	case *ast.Ident:
		if sentinel.MatchString(x.Name) {
			return x.Name
		}
	case *ast.SelectorExpr:
		if sentinel.MatchString(x.Sel.Name) {
			return x.Sel.Name
		}
	case *ast.CallExpr:
		name := callee(x)
		switch {
		case slices.Contains(coded, name):
			if text := words(x.Args); text != "" || len(x.Args) == 0 {
				return text
			}
			return words(x.Args[1:])
		case strings.HasPrefix(name, "invalid") || sentinel.MatchString(name):
			return strings.TrimSpace(name + " " + words(x.Args))
		case name == "New" && words(x.Args) != "":
			return words(x.Args)
		case name == "Errorf":
			causes := false
			for _, a := range x.Args[1:] {
				if r := f.refusal(a); r != "" {
					return words(x.Args[:1]) + ": " + r
				}
				if id, ok := a.(*ast.Ident); ok && (id.Name == "err" || id.Name == "e") {
					causes = true
				}
			}
			if !causes {
				return words(x.Args[:1])
			}
		}
	}
	return ""
}

// words joins the string literals and the section constants at the beginning of a call's arguments.
func words(args []ast.Expr) string {
	var out []string
	for _, a := range args {
		switch x := a.(type) {
		case *ast.BasicLit:
			if s, err := strconv.Unquote(x.Value); err == nil && x.Kind == token.STRING {
				out = append(out, s)
				continue
			}
		case *ast.Ident:
			if strings.HasPrefix(x.Name, "section") {
				out = append(out, x.Name)
				continue
			}
		}
		break
	}
	return strings.Join(out, " ")
}

// block looks for refusals among a list of statements. parent is the if or case that the list belongs to.
func (f *finder) block(n ast.Node, ft *ast.FuncType, parent ast.Node) {
	var list []ast.Stmt
	switch b := n.(type) {
	case *ast.BlockStmt:
		list = b.List
	case *ast.CaseClause:
		list = b.Body
	case *ast.CommClause:
		list = b.Body
	}
	done := false // the parent's condition is a guard already
	for _, s := range list {
		f.literals(s)
		switch x := s.(type) {
		case *ast.BlockStmt:
			f.block(x, ft, nil)
		case *ast.IfStmt:
			f.ifStmt(x, ft)
		case *ast.ForStmt:
			f.block(x.Body, ft, nil)
		case *ast.RangeStmt:
			f.block(x.Body, ft, nil)
		case *ast.LabeledStmt:
			f.block(&ast.BlockStmt{List: []ast.Stmt{x.Stmt}}, ft, nil)
		case *ast.SwitchStmt:
			for _, c := range x.Body.List {
				if x.Tag == nil {
					f.block(c, ft, c)
				} else {
					f.block(c, ft, nil)
				}
			}
		case *ast.TypeSwitchStmt:
			for _, c := range x.Body.List {
				f.block(c, ft, nil)
			}
		case *ast.ExprStmt:
			if c, ok := x.X.(*ast.CallExpr); ok && (callee(c) == "Fail" || callee(c) == "Failf") && !done {
				done = f.guard(x, parent, failure(c), "")
			}
		case *ast.ReturnStmt:
			if len(x.Results) > 0 && !done {
				f.returned(x, ft, parent)
			}
		}
	}
}

// returned looks at what a function returns last: an error that is made here, one that a call makes, or a comparison.
func (f *finder) returned(x *ast.ReturnStmt, ft *ast.FuncType, parent ast.Node) {
	last := x.Results[len(x.Results)-1]
	if r := f.refusal(last); r != "" {
		f.guard(x, parent, r, f.zero(ft))
		return
	}
	c, ok := last.(*ast.CallExpr)
	switch {
	case !ok:
	case returnsError(ft) && callee(c) != "Errorf" && f.refusing[callee(c)] && (onlyError(ft) || len(x.Results) > 1):
		f.before(last.Pos(), fmt.Sprintf("guardNil(%d, ", f.add("return "+callee(c))))
		f.after(last.End(), ")")
	case f.source(c.Fun) == "hmac.Equal":
		f.switched(last, f.add("hmac.Equal"), "|| ")
	}
}

func failure(c *ast.CallExpr) string {
	for _, a := range c.Args {
		if in, ok := a.(*ast.CallExpr); ok && callee(in) == "Errorf" {
			return "fail " + words(in.Args[:1])
		}
	}
	return strings.TrimSpace("fail " + words(c.Args))
}

// literals looks into the function literals of a statement's own expressions.
func (f *finder) literals(s ast.Stmt) {
	ast.Inspect(s, func(n ast.Node) bool {
		switch x := n.(type) {
		case *ast.BlockStmt: // visited by block
			return false
		case *ast.FuncLit:
			f.block(x.Body, x.Type, nil)
			return false
		}
		return true
	})
}

func (f *finder) ifStmt(x *ast.IfStmt, ft *ast.FuncType) {
	f.block(x.Body, ft, x)
	if c := checked(x); c != nil && f.refusing[callee(c)] && f.forwards(x.Body, ft) {
		f.conditions(x.Cond, "call "+callee(c))
	}
	switch e := x.Else.(type) {
	case *ast.IfStmt:
		f.ifStmt(e, ft)
	case *ast.BlockStmt:
		f.block(e, ft, nil)
	}
}

// checked is the call of "if err := call(); err != nil".
func checked(x *ast.IfStmt) *ast.CallExpr {
	a, ok := x.Init.(*ast.AssignStmt)
	if !ok || len(a.Lhs) != 1 || len(a.Rhs) != 1 {
		return nil
	}
	cond, ok := x.Cond.(*ast.BinaryExpr)
	if !ok || cond.Op != token.NEQ {
		return nil
	}
	if id, ok := cond.Y.(*ast.Ident); !ok || id.Name != "nil" {
		return nil
	}
	c, _ := a.Rhs[0].(*ast.CallExpr)
	return c
}

// forwards says whether a block returns an error that isn't made in it.
func (f *finder) forwards(b *ast.BlockStmt, ft *ast.FuncType) bool {
	if !returnsError(ft) || len(b.List) == 0 {
		return false
	}
	r, ok := b.List[len(b.List)-1].(*ast.ReturnStmt)
	return ok && len(r.Results) > 0 && f.refusal(r.Results[len(r.Results)-1]) == ""
}

// guard makes the refusal s conditional: through the condition of its if or case, or by itself. zero is the return that
// takes its place.
func (f *finder) guard(s ast.Stmt, parent ast.Node, text, zero string) bool {
	switch p := parent.(type) {
	case *ast.IfStmt:
		if b := p.Body.List; b[len(b)-1] == s || zero == "" {
			f.conditions(p.Cond, text)
			return true
		}
	case *ast.CaseClause:
		if p.List != nil {
			for _, e := range p.List {
				f.conditions(e, text)
			}
			return true
		}
	}
	n := f.add(text)
	f.before(s.Pos(), fmt.Sprintf("if !guardOff(%d) { ", n))
	f.after(s.End(), " }; "+zero)
	return false
}

// conditions makes each operand of a disjunction a guard of its own.
func (f *finder) conditions(e ast.Expr, text string) {
	if b, ok := e.(*ast.BinaryExpr); ok && b.Op == token.LOR {
		for _, x := range []ast.Expr{b.X, b.Y} {
			f.operand(x, text)
		}
		return
	}
	f.switched(e, f.add(text), "&& !")
}

func (f *finder) operand(e ast.Expr, text string) {
	if b, ok := e.(*ast.BinaryExpr); ok && b.Op == token.LOR {
		f.operand(b.X, text)
		f.operand(b.Y, text)
		return
	}
	f.switched(e, f.add(text+" {"+f.source(e)+"}"), "&& !")
}

// switched has e ask the switch n too: "&& !" for a condition that refuses, "|| " for one that accepts.
func (f *finder) switched(e ast.Expr, n int, op string) {
	f.before(e.Pos(), "((")
	f.after(e.End(), fmt.Sprintf(") %sguardOff(%d))", op, n))
}

// zero is the text of a return of zero values.
func (f *finder) zero(ft *ast.FuncType) string {
	var vals []string
	for _, field := range ft.Results.List {
		for range max(1, len(field.Names)) {
			vals = append(vals, "*new("+f.source(field.Type)+")")
		}
	}
	return "return " + strings.Join(vals, ", ")
}

func (f *finder) source(n ast.Node) string {
	text := string(f.text[f.fset.Position(n.Pos()).Offset:f.fset.Position(n.End()).Offset])
	return strings.Join(strings.Fields(text), " ")
}

func (f *finder) add(text string) int {
	id := f.fn + ": " + text
	f.seen[id]++
	if n := f.seen[id]; n > 1 {
		id += fmt.Sprintf(" #%d", n)
	}
	f.src.guards = append(f.src.guards, guard{id: id, n: len(f.src.guards) + 1})
	return len(f.src.guards)
}

func (f *finder) before(p token.Pos, s string) {
	o := f.fset.Position(p).Offset
	f.insert[o] = append(f.insert[o], s)
}

func (f *finder) after(p token.Pos, s string) {
	o := f.fset.Position(p).Offset
	f.insert[o] = append([]string{s}, f.insert[o]...)
}

func (f *finder) apply() []byte {
	var out bytes.Buffer
	at := 0
	for _, o := range slices.Sorted(func(yield func(int) bool) {
		for o := range f.insert {
			if !yield(o) {
				return
			}
		}
	}) {
		out.Write(f.text[at:o])
		out.WriteString(strings.Join(f.insert[o], ""))
		at = o
	}
	out.Write(f.text[at:])
	return out.Bytes()
}
