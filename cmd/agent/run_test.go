package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"golang.org/x/tools/txtar"
	"sigs.k8s.io/yaml"

	"github.com/hosthygiene/agent/pkg/config"
	"github.com/hosthygiene/agent/pkg/engine"
	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host/hosttest"
	"github.com/hosthygiene/agent/pkg/probes"
	"github.com/hosthygiene/agent/pkg/report"
)

// TestMain is the agent itself, or fetches a page, when a test starts this
// program to do so.
func TestMain(m *testing.M) {
	switch os.Getenv("TEST_AS_AGENT") {
	case "":
		os.Exit(m.Run())
	case "run":
		main()
	case "get":
		resp, err := http.Get(os.Args[1])
		if err == nil {
			_, err = io.Copy(os.Stdout, resp.Body)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
}

// socketClient speaks to the unix socket at path.
func socketClient(path string) *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}}, Timeout: 30 * time.Second}
}

func TestListenSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "x.sock")
	l, err := listenSocket(path)
	if err != nil {
		t.Fatal(err)
	}
	server := newServer(pprofHandler(), slog.New(slog.DiscardHandler))
	done := make(chan error)
	go func() { done <- server.Serve(l) }()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("its mode is %v", info.Mode())
	}
	// Of what is behind it: a heap profile is a gzip file, a trace says go 1.
	for page, begins := range map[string]string{
		"heap": "\x1f\x8b", "goroutine?debug=1": "goroutine profile:", "profile?seconds=1": "\x1f\x8b", "trace?seconds=0.1": "go 1.", "": "<html>",
	} {
		resp, err := socketClient(path).Get("http://agent/debug/pprof/" + page)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusOK || !bytes.HasPrefix(body, []byte(begins)) {
			t.Errorf("%s: %d %.40q %v", page, resp.StatusCode, body, err)
		}
	}

	// A predecessor that was killed leaves its socket behind.
	second, err := listenSocket(path)
	if err != nil {
		t.Fatal(err)
	}
	second.Close()
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 0 {
		t.Errorf("it leaves %v behind, %v", entries, err)
	}
	server.Close()
	if err := <-done; !errors.Is(err, http.ErrServerClosed) {
		t.Error(err)
	}

	// What is no socket is not deleted.
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listenSocket(path); err == nil || !strings.Contains(err.Error(), "is in the way") {
		t.Errorf("error %v", err)
	}
	if data, err := os.ReadFile(path); err != nil || string(data) != "precious" {
		t.Errorf("the file says %q, %v", data, err)
	}
}

// listeningSockets are the sockets a process can be reached by from outside, as
// "tcp 127.0.0.1:80" or "unix /run/x.sock", in its own network namespace and in
// PID 1's, which the agent visits.
func listeningSockets(t *testing.T, pid int) []string {
	t.Helper()
	own := map[string]bool{}
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil || len(fds) == 0 {
		t.Fatalf("no descriptors of %d: %v", pid, err)
	}
	for _, fd := range fds {
		if link, err := os.Readlink(fd); err == nil {
			if inode, ok := strings.CutPrefix(link, "socket:["); ok {
				own[strings.TrimSuffix(inode, "]")] = true
			}
		}
	}
	found := map[string]bool{}
	for _, proc := range []string{strconv.Itoa(pid), "1"} {
		// Fields count from 0. Listening is 0A in tcp, the flag 00010000 in unix;
		// a datagram socket receives as soon as it is bound, unless it is connected.
		for kind, at := range map[string]struct {
			inode, state, address int
			listens               []string
		}{
			"tcp": {9, 3, 1, []string{"0A"}}, "tcp6": {9, 3, 1, []string{"0A"}},
			"udp": {9, 3, 1, []string{"07"}}, "udp6": {9, 3, 1, []string{"07"}},
			"raw": {9, 3, 1, []string{"07"}}, "raw6": {9, 3, 1, []string{"07"}},
			"unix": {6, 3, 7, []string{"00010000"}},
		} {
			data, err := os.ReadFile("/proc/" + proc + "/net/" + kind)
			if err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(string(data)) {
				f := strings.Fields(line)
				if len(f) <= at.inode || !own[f[at.inode]] || !slices.Contains(at.listens, f[at.state]) {
					continue
				}
				where := ""
				if len(f) > at.address {
					where = f[at.address]
				}
				found[kind+" "+where] = true
			}
		}
		data, err := os.ReadFile("/proc/" + proc + "/net/packet")
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(data)) {
			if f := strings.Fields(line); len(f) > 8 && own[f[8]] {
				found["packet"] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(found))
}

// daemonCommand is "agent run", without an API server, in a network and a mount
// namespace of its own, in which /var/lib is empty.
func daemonCommand(t *testing.T, env []string, args ...string) *exec.Cmd {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, for namespaces and for /proc/1")
	}
	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(kubeconfig, []byte(`{apiVersion: v1, kind: Config, clusters: [{name: none, cluster: {server: "https://127.0.0.1:1"}}],
contexts: [{name: none, context: {cluster: none, user: none}}], users: [{name: none, user: {}}], current-context: none}`), 0o600); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", append([]string{"--net", "--mount", "sh", "-ec",
		`ip link set lo up; mount -t tmpfs none /var/lib; exec "$@"`, "sh",
		self, "run", "--kubeconfig", kubeconfig, "--node-name", "n1"}, args...)...)
	cmd.Env = append(append(os.Environ(), "TEST_AS_AGENT=run"), env...)
	return cmd
}

// startDaemon runs a daemonCommand until the test ends. said is what it logs.
func startDaemon(t *testing.T, env []string, args ...string) (cmd *exec.Cmd, said *lines) {
	t.Helper()
	cmd = daemonCommand(t, env, args...)
	out, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	said = new(lines)
	log := make(chan struct{})
	go func() {
		defer close(log)
		for scan := bufio.NewScanner(out); scan.Scan(); {
			t.Log(scan.Text())
			said.add(scan.Text())
		}
	}()
	t.Cleanup(func() {
		if err := cmd.Process.Signal(os.Interrupt); err != nil {
			t.Error(err)
		}
		<-log
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
	return cmd, said
}

// lines are what a process has said so far.
type lines struct {
	mu  sync.Mutex
	all []string
}

func (l *lines) add(line string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, line)
}

func (l *lines) with(text string) (found int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, line := range l.all {
		if strings.Contains(line, text) {
			found++
		}
	}
	return found
}

// daemonPage gets a page in the daemon's network namespace until it has text in it.
func daemonPage(t *testing.T, pid int, page, text string) string {
	t.Helper()
	for range 300 {
		cmd := exec.Command("nsenter", "--net", "--target", strconv.Itoa(pid), os.Args[0], page)
		cmd.Env = append(os.Environ(), "TEST_AS_AGENT=get")
		if out, err := cmd.Output(); err == nil && strings.Contains(string(out), text) {
			return string(out)
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Fatalf("%s has no %q", page, text)
	return ""
}

// What listens by default is what the README says, and nothing else: a daemon at
// work, in a network and a mount namespace of its own.
func TestDefaultListeners(t *testing.T) {
	const everywhere, loopback = "tcp6 00000000000000000000000000000000:4F2A", "tcp 0100007F:4F2A" // 20266
	const health, explain, profiles = "tcp 0100007F:4F2B", "unix /var/lib/host-hygiene/agent.sock", "unix /var/lib/host-hygiene/pprof.sock"
	for name, c := range map[string]struct {
		args, want []string
		page, text string // by which it is known to work
	}{
		"default":                          {nil, []string{everywhere, health, explain}, "20266/metrics", "hosthygiene_probe_status{"},
		"loopback":                         {[]string{"--metrics-address=127.0.0.1:20266"}, []string{loopback, health, explain}, "20266/metrics", "hosthygiene_probe_status{"},
		"profiles":                         {[]string{"--pprof-socket=/var/lib/host-hygiene/pprof.sock"}, []string{everywhere, health, explain, profiles}, "20267/healthz", "ok"},
		"no web config where one is named": {[]string{"--web.config.file=/nowhere/web.yml"}, []string{health, explain}, "20267/healthz", "ok"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			features := filepath.Join(t.TempDir(), "host-hygiene")
			cmd, _ := startDaemon(t, nil, append(c.args, "--nfd-features-file="+features)...)
			text := daemonPage(t, cmd.Process.Pid, "http://127.0.0.1:"+c.page, c.text)
			if strings.Contains(c.page, "metrics") {
				if found := identities(t, text); len(found) > 0 {
					t.Errorf("of this machine the metrics tell %q", found)
				}
			}
			slices.Sort(c.want)
			got := listeningSockets(t, cmd.Process.Pid)
			for range 300 { // health is there first
				if slices.Equal(got, c.want) {
					break
				}
				time.Sleep(100 * time.Millisecond)
				got = listeningSockets(t, cmd.Process.Pid)
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("it listens on %q, want %q", got, c.want)
			}
			data, err := os.ReadFile(features)
			for range 300 { // the first pass ends later
				if err == nil {
					break
				}
				time.Sleep(100 * time.Millisecond)
				data, err = os.ReadFile(features)
			}
			if !bytes.HasPrefix(data, []byte("# +expiry-time=")) || !bytes.Contains(data, []byte("\nhosthygiene.io/Ready=")) {
				t.Errorf("node-feature-discovery is told %q, %v", data, err)
			}
		})
	}
}

// The kubelet asks once when the agent has started and not soon again: the answer
// waits for the first pass, but not for an API server that is away.
func TestReadyWaitsForTheFirstPass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reported := make(chan struct{})
		ask := ready(reported, new(yielded))
		check := func(code int, took time.Duration) {
			t.Helper()
			began, w := time.Now(), httptest.NewRecorder()
			ask(w, httptest.NewRequestWithContext(t.Context(), "GET", "/readyz", nil))
			if w.Code != code || time.Since(began) != took {
				t.Errorf("%d after %s, want %d after %s", w.Code, time.Since(began), code, took)
			}
		}
		check(http.StatusServiceUnavailable, readyPatience)
		time.AfterFunc(2*time.Second, func() { close(reported) })
		check(http.StatusOK, 2*time.Second)
		check(http.StatusOK, 0)
	})
}

// What fails while the agent is at work ends all of it, with the reason.
func TestAFailureEndsTheAgent(t *testing.T) {
	config := filepath.Join(t.TempDir(), "web.yml")
	if err := os.WriteFile(config, []byte("basic_auth_users: {prometheus: "+hashOfRight+"}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	// Health is there first.
	out, err := daemonCommand(t, nil, "--web.config.file="+config, "--metrics-address=127.0.0.1:20267").CombinedOutput()
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok || exit.ExitCode() != exitFinding || !strings.Contains(string(out), "agent: listening on 127.0.0.1:20267") {
		t.Errorf("%v\n%s", err, out)
	}
}

// identities are the label values in the text that look like the name of one
// certain host, disk or initiator.
func identities(t *testing.T, text string, known ...string) []string {
	t.Helper()
	found := map[string]bool{}
	for _, family := range families(t, text) {
		for _, m := range family.GetMetric() {
			for _, l := range m.GetLabel() {
				if l.GetName() == "goversion" || l.GetName() == "version" {
					continue
				}
				if looksUnique.MatchString(l.GetValue()) || slices.ContainsFunc(known, func(id string) bool { return strings.Contains(l.GetValue(), id) }) {
					found[family.GetName()+" "+l.GetName()+"="+l.GetValue()] = true
				}
			}
		}
	}
	return slices.Sorted(maps.Keys(found))
}

// Twelve hexadecimal digits are what is left of a hash. More of them, and the
// forms of iSCSI and NVMe names, are no hash but the thing itself.
var looksUnique = regexp.MustCompile(`(?i)(iqn|eui|naa|nqn)\.|[0-9a-f]{13}|[0-9a-f]{8}-[0-9a-f]{4}`)

func families(t *testing.T, text string) map[string]*dto.MetricFamily {
	t.Helper()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return families
}

// TestMetricsTellNoIdentity scrapes every metric of the agent after the probes'
// cases, all of them where disks and initiators have names, and looks for what those hosts call their own: WWIDs, serial
// numbers, initiators' and targets' names, the machine's id and name.
func TestMetricsTellNoIdentity(t *testing.T) {
	t.Parallel()
	const hostName, machineID = "node-of-a-case.example.com", "4c4c4544004a10568051b7c04f503732"
	cases, err := filepath.Glob("../../pkg/probes/testdata/*/*.txtar")
	if err != nil {
		t.Fatal(err)
	}
	seen, hashed, planted := map[string]bool{}, map[string]bool{}, 0
	count := map[string]int{}
	for _, file := range cases {
		ar, err := txtar.ParseFile(file)
		if err != nil {
			t.Fatal(err)
		}
		name := filepath.Base(filepath.Dir(file))
		if count[name]++; count[name] > 8 && name != "multipath" && name != "iscsi" {
			continue
		}
		for name, text := range map[string]string{"tree/etc/hostname": hostName, "tree/etc/machine-id": machineID} {
			if !slices.ContainsFunc(ar.Files, func(f txtar.File) bool { return f.Name == name }) {
				ar.Files = append(ar.Files, txtar.File{Name: name, Data: []byte(text + "\n")})
			}
		}
		h := hosttest.New(t, ar)
		cfg := config.Default().Sections
		if text, ok := h.Section("config"); ok {
			settings, err := yaml.YAMLToJSON([]byte(text))
			if err != nil {
				t.Fatal(err)
			}
			if err := json.Unmarshal(fmt.Appendf(nil, "{%q: %s}", name, settings), &cfg.Probes); err != nil {
				t.Fatal(err)
			}
		}
		if text, ok := h.Section("require"); ok {
			if err := yaml.Unmarshal([]byte(text), &cfg.Require); err != nil {
				t.Fatal(err)
			}
		}
		list := cfg.Probes.List()
		at := slices.IndexFunc(list, func(p probes.Probe) bool { return p.Name() == name })
		if at < 0 {
			continue // a parser's cases
		}
		known := identitiesOf(ar)
		planted += len(known)
		metrics := report.NewMetrics("v1", func() map[[2]string]int { return map[[2]string]int{{"events", "ok"}: 1} })
		metrics.Remedies = func() map[[2]string]int { return map[[2]string]int{{"install-package", "failed"}: 1} }
		in := probes.Input{Host: h, Require: cfg.Require, Memory: probes.NewMemory()}
		for i, now := range h.Times() {
			if i > 0 {
				h.Pass(i + 1)
			}
			in.Now = now
			in.Memory.Begin()
			r, err := list[at].Check(t.Context(), in)
			metrics.Report(engine.Snapshot{
				Config: &cfg, Probes: list, Runs: map[engine.RunKey]int{{Probe: name, Result: "ok"}: 1}, LastSuccess: map[string]time.Time{name: now},
				Reports: []finding.Report{{Probe: name, Status: finding.StatusOf(r, err), Findings: r.Findings, Samples: r.Samples, Err: err}},
			})
			w := httptest.NewRecorder()
			metricsHandler(metrics).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
			text := w.Body.String()
			if w.Code != http.StatusOK {
				t.Fatalf("%s: %d %s", file, w.Code, text)
			}
			for _, id := range identities(t, text, known...) {
				t.Errorf("%s: %s", file, id)
			}
			for name, family := range families(t, text) {
				seen[name] = true
				for _, m := range family.GetMetric() {
					for _, l := range m.GetLabel() {
						if l.GetName() == "hash" || strings.HasPrefix(l.GetValue(), "wwid-") {
							hashed[name] = true
						}
					}
				}
			}
		}
	}
	// Every metric there is, but one of the go and process collectors, has a series.
	for _, name := range []string{
		"hosthygiene_problem", "hosthygiene_probe_status", "hosthygiene_probe_duration_seconds", "hosthygiene_probe_runs_total",
		"hosthygiene_probe_last_success_timestamp_seconds", "hosthygiene_time_offset_seconds", "hosthygiene_time_error_bound_seconds",
		"hosthygiene_multipath_paths", "hosthygiene_iscsi_sessions", "hosthygiene_iscsi_initiator_info", "hosthygiene_identity_info", "hosthygiene_pids",
		"hosthygiene_oom_kills_total", "hosthygiene_package_installed", "hosthygiene_api_writes_total", "hosthygiene_remedies_total",
		"hosthygiene_config_last_reload_successful", "hosthygiene_build_info",
	} {
		if !seen[name] {
			t.Errorf("no case has %s", name)
		}
	}
	for name := range seen {
		if !strings.HasPrefix(name, "hosthygiene_") && !strings.HasPrefix(name, "go_") && !strings.HasPrefix(name, "process_") {
			t.Errorf("%s is not ours", name)
		}
	}
	if got := slices.Sorted(maps.Keys(hashed)); !slices.Equal(got, []string{"hosthygiene_identity_info", "hosthygiene_iscsi_initiator_info", "hosthygiene_multipath_paths"}) {
		t.Errorf("hashes are in %q", got)
	}
	t.Logf("%d identities, %d metrics", planted, len(seen))
	if planted < 500 {
		t.Errorf("only %d identities in all cases: the test does not find them any more", planted)
	}
}

var (
	identityFile = regexp.MustCompile(`/(wwid|serial|machine-id|hostname|uuid|targetname|initiatorname)(@\d+)?$`)
	identityText = regexp.MustCompile(`(?i)\b(iqn|eui|naa|nqn)\.[a-z0-9][a-z0-9.:_-]{3,}|\b[0-9a-f]{16,}\b|\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]+`)
)

// identitiesOf are the names that a case's host has of its own.
func identitiesOf(ar *txtar.Archive) []string {
	found := map[string]bool{}
	for _, f := range ar.Files {
		if f.Name == "want" {
			continue
		}
		for _, id := range identityText.FindAllString(f.Name+"\n"+string(f.Data), -1) {
			found[id] = true
		}
		if identityFile.MatchString(f.Name) {
			for line := range strings.Lines(string(f.Data)) {
				if id := strings.TrimSpace(strings.TrimPrefix(line, "mpath-")); len(id) > 3 {
					found[id] = true
				}
			}
		}
	}
	return slices.Sorted(maps.Keys(found))
}
