//go:build cluster

package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// command is a line of a page in docs/runbooks, which kubectl runs where the
// administrator is and not on the node.
type command struct {
	page, line string
	kubectl    bool
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
				mend = append(mend, command{page: page, line: line})
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

// Tools of the pages that the node's image does not have. An initramfs that is
// made anew for three of them takes minutes under emulation, and nothing boots it.
const runbookTools = `export DEBIAN_FRONTEND=noninteractive
sed -i s/^update_initramfs=.*/update_initramfs=no/ /etc/initramfs-tools/update-initramfs.conf
apt-get update -q >/dev/null
apt-get install -y -q --no-install-recommends -o Dpkg::Options::=--force-unsafe-io psmisc curl lvm2 btrfs-progs smartmontools iputils-ping util-linux-extra mdadm nvme-cli openssl >/dev/null`

// misused is what a command says that was not understood, apart from its exit
// code, which also tells of things that are not there.
var misused = regexp.MustCompile(`(?im)invalid option|unrecognized option|unrecognized argument|unknown option|unknown user-defined|unknown (command|verb)|unknown operation|syntax error|command not found|bad usage|Try '.*--help|^usage:`)

// isNotHere is what kubectl says of an object, or of the operator's kinds, that
// this cluster does not have.
var isNotHere = regexp.MustCompile(`\(NotFound\)|the server doesn't have a resource type`)

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
	first := map[string]int{} // each is run once, however many pages have it
	var onNode []int
	for i, c := range commands {
		line := placeholder.ReplaceAllStringFunc(c.line, func(p string) string { return values[p] })
		commands[i].line = line
		if _, again := first[line]; again {
			continue
		}
		first[line] = i
		if !c.kubectl {
			onNode = append(onNode, i)
		}
	}
	t.Cleanup(func() { // what the pages stop, and end
		ctx := w.CleanupContext(t)
		if _, err := w.TryGuest(ctx, "mountpoint -q /data || mount /data; umount /spare || true; rm -f /etc/sysctl.d/99-host-hygiene.conf /etc/modules-load.d/60-*.conf /etc/apt/apt.conf.d/99-no-automatic-reboot; systemctl disable --now apt-daily.timer apt-daily-upgrade.timer; systemctl unmask chrony; systemctl enable --now chrony multipathd iscsid.socket; dpkg --configure -a; apt-get purge -q -y unattended-upgrades"); err != nil {
			t.Error(err)
		}
	})
	count := map[int]int{}
	judge := func(t *testing.T, c command, code int, said string) {
		t.Helper()
		count[code]++
		switch {
		case (misused.MatchString(said) || code == 126 || code == 127) && !strings.Contains(c.line, "|| rpm"):
			t.Errorf("%s: exit code %d: %s\n%s", c.page, code, c.line, said)
		case code != 0:
			t.Logf("%s: exit code %d: %s\n\t%s", c.page, code, c.line, strings.ReplaceAll(said, "\n", "\n\t"))
		}
	}
	began := time.Now()
	t.Run("on the node", func(t *testing.T) {
		w.Guest(t, "mountpoint -q /spare || mount /spare")
		for some := range slices.Chunk(onNode, 25) {
			var script strings.Builder
			for _, i := range some {
				quoted := "'" + strings.ReplaceAll(commands[i].line, "'", `'\''`) + "'"
				fmt.Fprintf(&script, "code=0; timeout 300 bash -c %s </dev/null >/run/said 2>&1 || code=$?\nprintf '\\n@@ %d %%s\\n' $code; tail -c 2000 /run/said\n", quoted, i)
			}
			out, err := w.TryGuest(ctx, script.String())
			answers := strings.Split("\n"+out, "\n@@ ")[1:]
			if err != nil || len(answers) != len(some) {
				t.Errorf("%d of %d commands were run: %v\n%s", len(answers), len(some), err, out[max(0, len(out)-2000):])
			}
			for _, answer := range answers {
				headline, said, _ := strings.Cut(answer, "\n")
				var i, code int
				if _, err := fmt.Sscan(headline, &i, &code); err != nil {
					t.Fatalf("%q: %v", headline, err)
				}
				judge(t, commands[i], code, strings.TrimSpace(said))
			}
		}
	})
	t.Run("kubectl", func(t *testing.T) {
		for i, c := range commands {
			if !c.kubectl || first[c.line] != i {
				continue
			}
			kubectl := w.ControlPlane.KubectlCommand(ctx)
			cmd := exec.CommandContext(ctx, "bash", "-c", c.line)
			cmd.Env = append(os.Environ(), "KUBECONFIG="+w.ControlPlane.Kubeconfig(), "PATH="+filepath.Dir(kubectl.Path)+":"+os.Getenv("PATH"))
			out, err := cmd.CombinedOutput()
			if err != nil && !isNotHere.Match(out) && !strings.Contains(c.line, "| grep ") {
				t.Errorf("%s: %s: %v: %s", c.page, c.line, err, out)
			}
			judge(t, c, cmd.ProcessState.ExitCode(), string(out))
		}
	})
	w.Note("runbooks", fmt.Sprintf("%d commands in %s, by exit code: %v", len(first), time.Since(began).Round(time.Second), count))
}
