// Package man makes manual pages of the commands themselves, and holds those that
// are checked in to them. Cobra's own are not used: mandoc objects to each of
// their options, which groff runs into one line with what they are for.
package man

import (
	"bytes"
	"cmp"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Hold compares the pages of a command and of those under it with what lies in
// dir under the command's name, or writes them there.
func Hold(t *testing.T, root *cobra.Command, dir string, update bool) {
	t.Helper()
	root.InitDefaultCompletionCmd()
	pages := map[string][]byte{}
	add(root, pages)
	fits(t, root)
	old, err := filepath.Glob(filepath.Join(dir, title(root)+"*.1"))
	if err != nil {
		t.Fatal(err)
	}
	if update {
		for _, file := range old {
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
		}
		for file, page := range pages {
			if err := os.WriteFile(filepath.Join(dir, file), page, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	for file, want := range pages {
		got, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			t.Errorf("%v: run make generate", err)
			continue
		}
		if d := gocmp.Diff(string(got), string(want)); d != "" {
			t.Errorf("%s differs from the command; run make generate (-page +command)\n%s", file, d)
		}
	}
	for _, file := range old {
		if pages[filepath.Base(file)] == nil && !update {
			t.Errorf("%s is of no command any more: run make generate", file)
		}
	}
	lint(t, pages)
}

// fits: the texts of help are broken by hand, and stand as they are in a terminal
// of 80 columns.
func fits(t *testing.T, cmd *cobra.Command) {
	t.Helper()
	for line := range strings.SplitSeq(cmd.Long+"\n"+cmd.Example, "\n") {
		if n := utf8.RuneCountInString(line); n > 80 && cmd.Name() != "completion" {
			t.Errorf("%s --help: a line of %d columns: %s", cmd.CommandPath(), n, line)
		}
	}
	for _, c := range listed(cmd) {
		fits(t, c)
	}
}

// add makes the page of a command and of those that help lists under it.
func add(cmd *cobra.Command, pages map[string][]byte) {
	pages[title(cmd)+".1"] = Page(cmd)
	for _, c := range listed(cmd) {
		add(c, pages)
	}
}

// listed are the commands under one that have a page: one shell's completion is
// told by its --help.
func listed(cmd *cobra.Command) (out []*cobra.Command) {
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() && cmd.Name() != "completion" {
			out = append(out, c)
		}
	}
	return out
}

func title(cmd *cobra.Command) string { return strings.ReplaceAll(cmd.CommandPath(), " ", "-") }

// Page is the manual page of one command, in the macros of man(7). It has no date:
// it changes with the command only.
func Page(cmd *cobra.Command) []byte {
	p := new(page)
	fmt.Fprintf(p, ".TH %s 1 \"\" \"host-hygiene\" \"host-hygiene\"\n", escape(strings.ToUpper(title(cmd))))
	p.section("NAME")
	p.text(title(cmd) + " - " + cmd.Short)
	p.section("SYNOPSIS")
	_, args, _ := strings.Cut(cmd.Use, " ")
	if len(listed(cmd)) > 0 && !cmd.Runnable() {
		args = "COMMAND"
	}
	args = strings.TrimSpace(`[\fIoption\fP ...] ` + escape(args))
	fmt.Fprintf(p, "\\fB%s\\fP %s\n", escape(cmd.CommandPath()), args)
	if len(listed(cmd)) > 0 && cmd.Runnable() {
		p.macro("br")
		fmt.Fprintf(p, "\\fB%s\\fP COMMAND\n", escape(cmd.CommandPath()))
	}
	p.section("DESCRIPTION")
	var lists [][2]string
	first := true
	for para := range strings.SplitSeq(cmp.Or(cmd.Long, cmd.Short), "\n\n") {
		if m := list.FindStringSubmatch(para); m != nil {
			lists = append(lists, [2]string{m[1], para[len(m[0]):]})
			continue
		}
		if !first {
			p.macro("PP")
		}
		first = false
		if strings.HasPrefix(para, "\t") {
			p.example(para)
		} else {
			p.text(para)
		}
	}
	if under := listed(cmd); len(under) > 0 {
		p.section("COMMANDS")
		for _, c := range under {
			p.item(`\fB`+escape(c.Name())+`\fP`, c.Short)
		}
	}
	p.flags("OPTIONS", cmd.NonInheritedFlags())
	p.flags("OPTIONS OF EVERY COMMAND", cmd.InheritedFlags())
	for _, l := range lists {
		p.section(map[string]string{"Exit codes": "EXIT STATUS", "Environment": "ENVIRONMENT", "Files": "FILES"}[l[0]])
		for _, item := range strings.Split(strings.TrimSuffix(strings.ReplaceAll(l[1], "\n", " "), "."), "; ") {
			tag, text, _ := strings.Cut(item, " ")
			p.item(`\fB`+escape(tag)+`\fP`, text+".")
		}
	}
	if cmd.Example != "" {
		p.section("EXAMPLES")
		p.example(cmd.Example)
	}
	var see []string
	if cmd.HasParent() {
		see = append(see, title(cmd.Parent()))
	}
	for _, c := range listed(cmd) {
		see = append(see, title(c))
	}
	if len(see) > 0 {
		p.section("SEE ALSO")
		for i, name := range see {
			end := ","
			if i == len(see)-1 {
				end = ""
			}
			fmt.Fprintf(p, ".BR %s (1)%s\n", escape(name), end)
		}
	}
	return p.Bytes()
}

// list is the beginning of a paragraph that lists: "0 nothing is wrong; 1 …".
var list = regexp.MustCompile(`^(Exit codes|Environment|Files)[^:]*:\s`)

type page struct{ bytes.Buffer }

func (p *page) macro(name string) { fmt.Fprintf(p, ".%s\n", name) }

func (p *page) section(name string) { fmt.Fprintf(p, ".SH %s\n", name) }

func (p *page) text(text string) {
	for line := range strings.SplitSeq(strings.TrimSpace(text), "\n") {
		fmt.Fprintln(p, escape(strings.TrimSpace(line)))
	}
}

func (p *page) item(tag, text string) {
	p.macro("TP")
	fmt.Fprintln(p, tag)
	p.text(text)
}

func (p *page) example(text string) {
	p.macro("EX")
	for line := range strings.SplitSeq(strings.Trim(text, "\n"), "\n") {
		fmt.Fprintln(p, escape(strings.TrimSpace(line)))
	}
	p.macro("EE")
}

func (p *page) flags(name string, set *pflag.FlagSet) {
	if !set.HasAvailableFlags() {
		return
	}
	p.section(name)
	set.VisitAll(func(f *pflag.Flag) {
		if f.Hidden {
			return
		}
		tag := `\fB` + escape("--"+f.Name) + `\fP`
		if f.Shorthand != "" {
			tag = `\fB` + escape("-"+f.Shorthand) + `\fP, ` + tag
		}
		value, usage := pflag.UnquoteUsage(f)
		switch value { // pflag's own names
		case "string", "stringArray":
			value = "value"
		case "strings":
			value = "values"
		case "int":
			value = "number"
		}
		if value != "" {
			tag += ` \fI` + escape(value) + `\fP`
		}
		if def := f.DefValue; value != "" && def != "" && def != "[]" && def != "0" && def != "0s" {
			usage += " (" + def + " without it)"
		}
		p.item(tag, usage)
	})
}

// escape makes text what roff shows as it is (groff_char(7)): a hyphen that can be
// copied, no order of roff's.
func escape(s string) string {
	s = strings.NewReplacer(`\`, `\e`, "-", `\-`, "`", `\(ga`, "'", `\(aq`, "^", `\(ha`, "~", `\(ti`, "…", "...").Replace(s)
	if strings.HasPrefix(s, ".") {
		s = `\&` + s
	}
	return s
}

func lint(t *testing.T, pages map[string][]byte) {
	t.Helper()
	if _, err := exec.LookPath("mandoc"); err != nil {
		t.Logf("not linted, for there is no mandoc here: make setup")
		return
	}
	dir := t.TempDir()
	for file, page := range pages {
		if err := os.WriteFile(filepath.Join(dir, file), page, 0o644); err != nil {
			t.Fatal(err)
		}
		out, _ := exec.Command("mandoc", "-T", "lint", "-W", "warning", filepath.Join(dir, file)).CombinedOutput()
		for line := range strings.Lines(string(out)) {
			if !strings.Contains(line, "missing date") {
				t.Errorf("%s: %s", file, strings.TrimPrefix(line, dir+"/"))
			}
		}
	}
}
