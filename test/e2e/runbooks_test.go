//go:build cluster

package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// command is a line of a page in docs/runbooks.
type command struct {
	page, line string
	// kubectl is run where the administrator is and not on the node; mends changes
	// something.
	kubectl, mends bool
}

// runbookCommands are those of all pages: what looks, then what mends.
func runbookCommands(t *testing.T) []command {
	t.Helper()
	files, err := filepath.Glob("../../docs/runbooks/*.md")
	if err != nil {
		t.Fatal(err)
	}
	var look, mend []command
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		page := strings.TrimSuffix(filepath.Base(f), ".md")
		fence := ""
		for line := range strings.Lines(string(text)) {
			line = strings.TrimRight(line, "\n")
			if rest, ok := strings.CutPrefix(line, "```"); ok {
				if fence == "" {
					fence = "`" + rest
				} else {
					fence = ""
				}
				continue
			}
			switch prompt := strings.TrimLeft(line, "#$"); {
			case fence == "`sh":
				mend = append(mend, command{page: page, line: line, mends: true})
			case fence == "`console" && strings.HasPrefix(line, "# "):
				look = append(look, command{page: page, line: strings.TrimSpace(prompt)})
			case fence == "`console" && strings.HasPrefix(line, "$ "):
				look = append(look, command{page: page, line: strings.TrimSpace(prompt), kubectl: true})
			case fence == "`console":
				t.Errorf("%s: neither for the node nor for kubectl: %s", page, line)
			}
		}
	}
	if len(look) < 200 || len(mend) < 50 {
		t.Fatalf("%d and %d commands: the pages are read wrongly", len(look), len(mend))
	}
	return append(look, mend...)
}

// Tools of the pages that the node's image does not have.
const runbookTools = `export DEBIAN_FRONTEND=noninteractive
apt-get update -q >/dev/null && apt-get install -y -q --no-install-recommends psmisc curl lvm2 btrfs-progs smartmontools iputils-ping util-linux-extra mdadm nvme-cli >/dev/null`

// misused is what a command says that was not understood, apart from its exit
// code, which also tells of things that are not there.
var misused = regexp.MustCompile(`(?i)invalid option|unrecognized option|unrecognized argument|unknown option|unknown (command|verb)|unknown operation|syntax error|command not found|bad usage|Try '.*--help'|^usage: `)

// runbooks runs the commands of the runbooks as they stand there, on a node that
// is well: each must be one that this node understands.
func (w *world) runbooks(t *testing.T) {
	commands := runbookCommands(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	if _, err := w.TryGuest(ctx, runbookTools); err != nil {
		t.Logf("not all tools are there: %v", err)
	}
	disk := w.Guest(t, `ls /sys/block/$(basename $(readlink -f /dev/mapper/mpatha))/slaves | head -n 1`)
	placeholder := regexp.MustCompile(`\b(MAP|DISK|UNIT|MOUNT|MODULE|SYSCTL|PACKAGE|FILE|PID|PORTAL|NODE)\b`)
	values := map[string]string{
		"MAP": "mpatha", "DISK": disk, "UNIT": "chrony.service", "MOUNT": "/data", "MODULE": "br_netfilter", "SYSCTL": "kernel.pid_max",
		"PACKAGE": "chrony", "FILE": "/etc/multipath.conf", "PID": "1", "PORTAL": "127.0.0.1", "NODE": w.Node.Name(),
	}
	var script strings.Builder
	script.WriteString("mountpoint -q /spare || mount /spare || true\n")
	first := map[string]int{} // what looks is asked once, however many pages have it
	for i, c := range commands {
		line := placeholder.ReplaceAllStringFunc(c.line, func(p string) string { return values[p] })
		commands[i].line = line
		if _, again := first[line]; !c.kubectl && (c.mends || !again) {
			first[line] = i
			quoted := "'" + strings.ReplaceAll(line, "'", `'\''`) + "'"
			fmt.Fprintf(&script, "out=$(timeout 90 bash -c %s </dev/null 2>&1) && code=0 || code=$?\nprintf '@@ %d %%s\\n%%s\\n' $code \"$(printf %%s \"$out\" | tail -n 12 | cut -c1-300)\"\n", quoted, i)
		}
	}
	t.Cleanup(func() { // what the pages stop, and end
		ctx := w.CleanupContext(t)
		if _, err := w.TryGuest(ctx, "mountpoint -q /data || mount /data; umount /spare || true; rm -f /etc/sysctl.d/99-host-hygiene.conf /etc/modules-load.d/60-*.conf; systemctl unmask chrony; systemctl enable --now chrony multipathd iscsid.socket"); err != nil {
			t.Error(err)
		}
	})
	began := time.Now()
	out, err := w.TryGuest(ctx, script.String())
	if err != nil {
		t.Errorf("%v\n%s", err, out[max(0, len(out)-2000):])
	}
	codes, said := map[int]int{}, map[int]string{}
	for _, part := range strings.Split("\n"+out, "\n@@ ")[1:] {
		headline, text, _ := strings.Cut(part, "\n")
		number, code, _ := strings.Cut(headline, " ")
		i, err1 := strconv.Atoi(number)
		n, err2 := strconv.Atoi(code)
		if err1 != nil || err2 != nil {
			t.Fatalf("%q", headline)
		}
		codes[i], said[i] = n, text
	}
	count := map[int]int{}
	for i, c := range commands {
		if c.kubectl {
			cmd := w.ControlPlane.KubectlCommand(ctx, strings.Fields(c.line)[1:]...)
			text, err := cmd.CombinedOutput()
			codes[i], said[i] = cmd.ProcessState.ExitCode(), string(text)
			if err != nil && !strings.Contains(said[i], "the server doesn't have a resource type") { // the operator's own
				t.Errorf("%s: %s: %v: %s", c.page, c.line, err, said[i])
			}
		}
		code, ran := codes[i]
		if at, ok := first[c.line]; ok && at < i && !c.mends {
			continue
		}
		count[code]++
		switch {
		case !ran:
			t.Errorf("%s: was not run: %s", c.page, c.line)
		case misused.MatchString(said[i]) || (code == 126 || code == 127) && !strings.Contains(c.line, "|| rpm"):
			t.Errorf("%s: exit code %d: %s\n%s", c.page, code, c.line, said[i])
		case code != 0:
			t.Logf("%s: exit code %d: %s\n\t%s", c.page, code, c.line, strings.ReplaceAll(said[i], "\n", "\n\t"))
		}
	}
	w.Note("runbooks", fmt.Sprintf("%d commands in %s, by exit code: %v", len(commands), time.Since(began).Round(time.Second), count))
}
