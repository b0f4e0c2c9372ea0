//go:build cluster

package tutorial

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

var pictures = flag.Bool("pictures", false, "make the pictures of docs/tutorial.md anew")

const (
	columns = 160
	// mark is written before each block.
	mark = "\x1e"
)

// TestTutorial types the whole tutorial into one shell at one terminal. The
// cluster is the one that CLUSTER names; one that is up before is used, and taken
// down all the same, as the last block says.
func TestTutorial(t *testing.T) {
	if os.Getenv("HYGIENE_NIGHTLY") == "" {
		t.Skip("takes a quarter of an hour; set HYGIENE_NIGHTLY=1")
	}
	blocks := read(t)
	var script strings.Builder
	script.WriteString("set -e -o pipefail\ntrap 'kill $(jobs -p) 2>/dev/null || true; make cluster-down || true' EXIT\n")
	for i, b := range blocks {
		fmt.Fprintf(&script, "printf '%s%d %%(%%T)T\\n'\n%s", mark, i, b.Text)
	}
	fmt.Fprintf(&script, "printf '%send\\n'\n", mark)
	file := filepath.Join(t.TempDir(), "tutorial.sh")
	if err := os.WriteFile(file, []byte(script.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	// A terminal, as a reader has one: without it there would be no colours.
	cmd := exec.CommandContext(ctx, "script", "--quiet", "--return", "--command",
		fmt.Sprintf("stty cols %d rows 60 && exec bash --noprofile --norc %s", columns, file), "/dev/null")
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "TERM=xterm-256color")
	if os.Getenv("CLUSTER") == "" {
		cmd.Env = append(cmd.Env, "CLUSTER=tutorial")
	}
	// What the shell leaves running ends with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 2 * time.Minute
	out, err := cmd.Output()
	said := strings.Split(strings.ReplaceAll(string(out), "\r\n", "\n"), mark)[1:]
	for i, text := range said {
		first, rest, _ := strings.Cut(text, "\n")
		if i < len(blocks) {
			t.Logf("line %d, at %s:\n%s\n%s", blocks[i].Line, first, blocks[i].Text, rest)
		}
	}
	if err != nil || len(said) != len(blocks)+1 {
		t.Fatalf("%v, in block %d of %d", err, len(said), len(blocks))
	}
	if !*pictures {
		return
	}
	text, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	// A picture that has not been made yet stands in a comment.
	text = regexp.MustCompile(`(?m)^<!-- (!\[.*\)) -->$`).ReplaceAll(text, []byte("$1"))
	if err := os.WriteFile(document, text, 0o644); err != nil {
		t.Fatal(err)
	}
	for i, b := range blocks {
		if b.Picture == "" {
			continue
		}
		_, text, _ := strings.Cut(said[i], "\n")
		typed := ""
		for line := range strings.Lines(b.Text) {
			typed += "$ \x1b[1m" + strings.TrimSuffix(line, "\n") + "\x1b[0m\n"
		}
		if err := os.WriteFile(filepath.Join("../../docs/img", b.Picture+".svg"), SVG(typed+text, 250), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
