package probes

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/tools/txtar"

	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/host/hosttest"
)

func TestISCSI(t *testing.T) { runCases(t, "iscsi", DefaultISCSI) }

// watchedHost notes which files are read.
type watchedHost struct {
	host.View
	read []string
}

func (w *watchedHost) ReadFile(ctx context.Context, name string) ([]byte, error) {
	w.read = append(w.read, name)
	return w.View.ReadFile(ctx, name)
}

func (w *watchedHost) ReadFileMax(ctx context.Context, name string, limit int64) ([]byte, error) {
	w.read = append(w.read, name)
	return w.View.ReadFileMax(ctx, name, limit)
}

func (w *watchedHost) ReadAttributes(ctx context.Context, dir string, names ...string) []host.Attribute {
	for _, name := range names {
		w.read = append(w.read, dir+"/"+name)
	}
	return w.View.ReadAttributes(ctx, dir, names...)
}

// TestNoSecretIsRead runs every case of both probes that look at iSCSI sessions
// with secrets in all the files that may hold some: none of them may be opened,
// and no secret or initiator name may leave by a finding's head or a metric.
func TestNoSecretIsRead(t *testing.T) {
	const secret = "correct-horse-battery"
	extra := strings.ReplaceAll(`
-- tree/etc/iscsi/iscsid.conf --
node.session.auth.password = SECRET
-- tree/etc/iscsi/nodes/iqn.2024-03.example.storage:vol1/10.0.0.1,3260,1/default --
node.startup = automatic
node.session.auth.password = SECRET
-- tree/var/lib/iscsi/nodes/iqn.2024-03.example.storage:vol1/10.0.0.1,3260,1/default --
node.session.auth.password = SECRET
-- tree/var/lib/iscsi/send_targets/10.0.0.1,3260/st_config --
discovery.sendtargets.auth.password = SECRET
`, "SECRET", secret)
	for _, attr := range []string{"username", "password", "username_in", "password_in"} {
		extra += fmt.Sprintf("-- tree/sys/class/iscsi_session/session1/%s --\n%s\n", attr, secret)
	}
	files, err := filepath.Glob("testdata/*/*.txtar")
	if err != nil {
		t.Fatal(err)
	}
	ran := 0
	for _, file := range files {
		var p Probe
		switch filepath.Base(filepath.Dir(file)) {
		case "iscsi":
			p = DefaultISCSI()
		case "multipath":
			p = DefaultMultipath()
		default:
			continue
		}
		ran++
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		ar := txtar.Parse(text)
		if bytes.Contains(text, []byte("-- dirs --")) {
			continue // these cases have directories where the secrets would be
		}
		ar.Files = append(ar.Files, txtar.Parse([]byte(extra)).Files...)
		if !bytes.Contains(text, []byte("-- units --")) && !bytes.Contains(text, []byte("-- systemd --")) {
			ar.Files = append(ar.Files, txtar.File{Name: "systemd", Data: []byte("none\n")})
		}
		w := &watchedHost{View: hosttest.New(t, ar)}
		in := Input{Host: w, Memory: NewMemory(), Now: time.Now()}
		in.Require.Packages = []RequiredPackage{{Name: "iscsi"}, {Name: "multipath"}}
		r, err := p.Check(t.Context(), in)
		for _, name := range w.read {
			for _, word := range []string{"password", "username", "iscsid.conf", "/nodes", "send_targets"} {
				if strings.Contains(name, word) {
					t.Errorf("%s: %s was read", file, name)
				}
			}
		}
		if s := fmt.Sprintf("%+v %v", r, err); strings.Contains(s, secret) {
			t.Errorf("%s: a secret got out: %s", file, s)
		}
		heads := r.Summary
		for _, f := range r.Findings {
			heads += "\n" + f.Subject + "\n" + f.Message
		}
		for _, s := range r.Samples {
			heads += "\n" + strings.Join(s.Labels, " ")
		}
		for _, word := range []string{"iqn.1993-08", "iqn.2024-03.example:", "worker-1"} {
			if strings.Contains(heads, word) {
				t.Errorf("%s: an initiator name got out:\n%s", file, heads)
			}
		}
	}
	if ran < 2 {
		t.Fatal("no cases")
	}
}

func TestValidISCSIName(t *testing.T) {
	long := "iqn.2024-03.example:" + strings.Repeat("a", 203)
	for name, ok := range map[string]bool{
		"iqn.1993-08.org.debian:01:8f2c9d4ab1e7":      true,
		"iqn.1994-05.com.redhat:Node-1":               true,
		"iqn.2024-03.example":                         true,
		"iqn.2024-03.example:größe":                   true,
		"eui.02004567A425678D":                        true,
		"naa.52004567BA64678D":                        true,
		"naa.62004567BA64678D0123456789ABCDEF":        true,
		long:                                          true,
		long + "a":                                    false,
		"":                                            false,
		"worker-1":                                    false,
		"iqn.2024-13.example:a":                       false,
		"iqn.24-03.example:a":                         false,
		"iqn.2024-03.:a":                              false,
		"iqn.2024-03.example:":                        false,
		"iqn.2024-03.example:a b":                     false,
		"iqn.2024-03.example:a_b":                     false,
		"iqn.2024-03.example:a\x00":                   false,
		"iqn.2024-03.example:\xff":                    false,
		"eui.02004567A425678":                         false,
		"naa.02004567A425678D0":                       false,
		"IQN.2024-03.example:a":                       false,
		"InitiatorName=iqn.2024-03.example:a":         false,
		"iqn.2024-03.example:a # comment does not go": false,
	} {
		if err := validISCSIName(name); (err == nil) != ok {
			t.Errorf("%q: %v, want valid %t", name, err, ok)
		}
	}
}

func TestParseRecoveryTimeout(t *testing.T) {
	for text, want := range map[string]string{
		"120": "2m0s false true", "0": "0s false true", "off": "0s true true", "-1": "-1s true true",
		"": "0s false false", "99999999999": "0s false false", "5 s": "0s false false",
	} {
		d, endless, ok := parseRecoveryTimeout(text)
		if got := fmt.Sprint(d, " ", endless, " ", ok); got != want {
			t.Errorf("%q: %s, want %s", text, got, want)
		}
	}
}

func TestForbids(t *testing.T) {
	for conf, want := range map[string]string{
		"blacklist iscsi_tcp":                                "blacklist iscsi_tcp",
		"\tblacklist  iscsi-tcp":                             "blacklist iscsi-tcp",
		"install iscsi_tcp /bin/true":                        "install iscsi_tcp /bin/true",
		"install iscsi_tcp /usr/bin/false # x":               "install iscsi_tcp /usr/bin/false # x",
		"install iscsi_tcp /sbin/modprobe -i iscsi_tcp":      "",
		"#blacklist iscsi_tcp":                               "",
		"# blacklist iscsi_tcp":                              "",
		"blacklist iscsi_tcp_extra":                          "",
		"options iscsi_tcp debug=1\nalias false iscsi_tcp\n": "",
	} {
		if got := forbids([]byte(conf), "iscsi_tcp"); got != want {
			t.Errorf("%q: %q, want %q", conf, got, want)
		}
	}
}

// TestISCSIOnATree checks a directory that is no running host: what is in it is
// judged, what is not is told.
func TestISCSIOnATree(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"sys/block/vda/size": "2048\n", "proc/1/stat": "1 (systemd) S 0 1 1 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 5 0 0 0\n",
		"sys/class/iscsi_session/session1/state": "LOGGED_IN\n",
		initiatorNameFile[1:]:                    "InitiatorName=iqn.2024-03.example:a\n",
	} {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	tree, err := host.OpenTree(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	r, err := DefaultISCSI().Check(t.Context(), Input{Host: tree, Memory: NewMemory(), Now: time.Now()})
	if len(r.Findings) != 1 || r.Findings[0].Reason != "IscsidDown" {
		t.Errorf("%v, want IscsidDown", r.Findings)
	}
	if err == nil || !strings.Contains(err.Error(), "units") {
		t.Errorf("error %v, want that the units could not be seen", err)
	}
}

func FuzzParseInitiatorName(f *testing.F) {
	f.Add([]byte("## DO NOT EDIT OR REMOVE THIS FILE!\nInitiatorName=iqn.1993-08.org.debian:01:8f2c9d4ab1e7\n"))
	f.Add([]byte("GenerateName=yes\n"))
	f.Add([]byte(" InitiatorName = a=b \r\n#InitiatorName=x\nInitiatorAlias=y"))
	f.Add([]byte("InitiatorName=\x00\xff"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, name := range parseInitiatorName(data).names {
			if name == "" || strings.TrimSpace(name) != name || strings.Contains(name, "\n") {
				t.Errorf("name %q", name)
			}
			if validISCSIName(name) == nil && strings.ContainsAny(name, " \t\n\x00_#=") {
				t.Errorf("%q is called valid", name)
			}
		}
	})
}

// BenchmarkISCSI is a pass over 2,000 sessions, all well, as on a node with
// that many attached volumes.
func BenchmarkISCSI(b *testing.B) {
	var text strings.Builder
	text.WriteString("-- procs --\n600 iscsid\n-- units --\niscsid.service mainpid=600\n*\n-- tree/sys/block/vda/size --\n2048\n")
	text.WriteString("-- tree/etc/iscsi/initiatorname.iscsi --\nInitiatorName=iqn.2024-03.example:a\n")
	for i := range 2000 {
		fmt.Fprintf(&text, "-- tree/sys/class/iscsi_session/session%d/state --\nLOGGED_IN\n-- tree/sys/class/iscsi_session/session%d/initiatorname --\niqn.2024-03.example:a\n", i, i)
	}
	h := hosttest.Parse(b, text.String())
	in := Input{Host: h, Memory: NewMemory(), Now: time.Now()}
	b.ReportAllocs()
	for b.Loop() {
		r, err := DefaultISCSI().Check(b.Context(), in)
		if err != nil || len(r.Findings) > 0 {
			b.Fatal(err, r.Findings)
		}
	}
}
