//go:build cluster

package rig

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// The helper of TestNothingOutlivesItsParent is this test program again.
const helperEnv = "RIG_TEST_HELPER_DIR"

func TestControlPlaneEnforcesRBAC(t *testing.T) {
	ctx := t.Context()
	tools, err := BuildTools(ctx)
	if err != nil {
		t.Fatal(err)
	}
	before := children(t, os.Getpid())
	cp, err := StartControlPlane(ctx, t.TempDir(), tools, ControlPlaneOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cp.Stop() })

	kubectl := func(args ...string) string {
		t.Helper()
		out, err := cp.Kubectl(ctx, args...)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(out)
	}
	kubectl("create", "serviceaccount", "nobody")
	token := kubectl("create", "token", "nobody")
	if got := listNodes(t, cp, token); got != http.StatusForbidden {
		t.Errorf("an unbound service account listing nodes got %d, want 403", got)
	}
	if got := listNodes(t, cp, "no token at all"); got != http.StatusUnauthorized {
		t.Errorf("a false token listing nodes got %d, want 401", got)
	}
	kubectl("create", "clusterrole", "nodes", "--verb=list", "--resource=nodes")
	kubectl("create", "clusterrolebinding", "nodes", "--clusterrole=nodes", "--serviceaccount=default:nobody")
	deadline := time.Now().Add(10 * time.Second)
	got := listNodes(t, cp, token)
	for got != http.StatusOK && time.Now().Before(deadline) {
		time.Sleep(100 * time.Millisecond)
		got = listNodes(t, cp, token)
	}
	if got != http.StatusOK {
		t.Errorf("a bound service account listing nodes got %d, want 200", got)
	}

	if err := cp.PauseAPIServer(); err != nil {
		t.Fatal(err)
	}
	paused, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
	defer cancel()
	if _, err := cp.get(paused, "/readyz"); err == nil {
		t.Error("a paused API server answered")
	}
	if err := cp.ResumeAPIServer(); err != nil {
		t.Fatal(err)
	}
	if _, err := cp.get(ctx, "/readyz"); err != nil {
		t.Errorf("after resuming: %v", err)
	}
	if err := cp.StopAPIServer(); err != nil {
		t.Fatal(err)
	}
	if _, err := cp.get(ctx, "/readyz"); err == nil {
		t.Error("a stopped API server answered")
	}
	if err := cp.StartAPIServer(ctx); err != nil {
		t.Fatal(err)
	}
	if got := listNodes(t, cp, token); got != http.StatusOK {
		t.Errorf("after a restart the same token got %d, want 200", got)
	}

	audit, err := os.ReadFile(cp.AuditLog())
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(audit), `"system:serviceaccount:default:nobody"`) {
		t.Error("the audit log does not name the service account")
	}
	if err := cp.Stop(); err != nil {
		t.Fatal(err)
	}
	if left := children(t, os.Getpid()); len(left) > len(before) {
		t.Errorf("still running after Stop: %v", left)
	}
}

func TestNothingOutlivesItsParent(t *testing.T) {
	ctx := t.Context()
	if dir := os.Getenv(helperEnv); dir != "" {
		tools, err := BuildTools(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := StartControlPlane(ctx, dir, tools, ControlPlaneOptions{Controllers: true}); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "up"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute) // until it is killed
		t.Fatal("nobody killed the helper")
	}
	if _, err := BuildTools(ctx); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	helper := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestNothingOutlivesItsParent$")
	helper.Env = append(os.Environ(), helperEnv+"="+dir)
	if err := helper.Start(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); !exists(filepath.Join(dir, "up")); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the helper did not start a control plane")
		}
	}
	pids := children(t, helper.Process.Pid)
	if len(pids) < 4 {
		t.Fatalf("the helper runs %v, want four programs", pids)
	}
	if err := helper.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	helper.Wait() // says that it was killed
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		var left []string
		for pid, name := range pids {
			// The number may already be another process's, and an init that
			// is slow to reap leaves zombies.
			data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			if err == nil && strings.Contains(string(data), "("+name+") ") && !strings.Contains(string(data), ") Z ") {
				left = append(left, name)
			}
		}
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("outlived their parent: %v", left)
		}
	}
}

// TestNode tries what the suites build upon, one thing at a time. They use all of
// it in every run, so it runs at night, and when one of them has to be explained.
func TestNode(t *testing.T) {
	if os.Getenv("HYGIENE_NIGHTLY") == "" {
		t.Skip("test/e2e uses all of it; set HYGIENE_NIGHTLY=1")
	}
	ctx := t.Context()
	tools, err := BuildTools(ctx)
	if err != nil {
		t.Fatal(err)
	}
	image, err := BuildNodeImage(ctx, tools)
	if err != nil {
		t.Fatal(err)
	}
	before := children(t, os.Getpid())
	cp, err := StartControlPlane(ctx, t.TempDir(), tools, ControlPlaneOptions{Controllers: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cp.Stop() })
	n, err := StartNode(ctx, cp, image, NodeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Stop() })

	// eventually runs a script until it prints what is wanted.
	eventually := func(what, script string, ok func(string) bool) {
		t.Helper()
		var out string
		var err error
		for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(300 * time.Millisecond) {
			if out, err = n.Run(ctx, script); err == nil && ok(strings.TrimSpace(out)) {
				return
			}
		}
		t.Errorf("%s: %q printed %q (%v)", what, script, out, err)
	}
	is := func(want string) func(string) bool { return func(got string) bool { return got == want } }
	has := func(want string) func(string) bool {
		return func(got string) bool { return strings.Contains(got, want) }
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}

	// A healthy host is what every scenario starts from.
	eventually("units", "systemctl is-system-running", is("running"))
	eventually("clock", "chronyc -n tracking", has("Leap status     : Normal"))
	eventually("two paths", "multipath -ll | grep -c 'active ready running'", is("2"))
	eventually("iSCSI", "iscsiadm -m session", has("iqn.2026-01.io.hosthygiene:rig"))
	eventually("unwanted map", "multipath -ll -v1", is("mpatha"))
	eventually("data disk", "findmnt -no TARGET /data", is("/data"))

	t.Run("a path is pulled out", func(t *testing.T) {
		must(n.Unplug(ctx, "path-b"))
		eventually("one path", "multipath -ll | grep -c 'active ready running'", is("1"))
		must(n.Replug(ctx, "path-b"))
		eventually("both paths", "multipath -ll | grep -c 'active ready running'", is("2"))
	})
	t.Run("a disk is pulled out", func(t *testing.T) {
		must(n.Unplug(ctx, "data"))
		eventually("by-id", "test -e /dev/disk/by-id/virtio-DATA || echo gone", is("gone"))
		must(n.Replug(ctx, "data"))
		eventually("by-id", "test -e /dev/disk/by-id/virtio-DATA && echo back", is("back"))
	})
	t.Run("a disk is put in", func(t *testing.T) {
		must(n.Plug(ctx, "EXTRA", 16<<20))
		eventually("by-id", "blockdev --getsize64 /dev/disk/by-id/virtio-EXTRA", is("16777216"))
		must(n.Unplug(ctx, "EXTRA"))
		eventually("by-id", "test -e /dev/disk/by-id/virtio-EXTRA || echo gone", is("gone"))
		must(n.Plug(ctx, "EXTRA", 32<<20))
		eventually("by-id", "blockdev --getsize64 /dev/disk/by-id/virtio-EXTRA", is("33554432"))
	})
	t.Run("the time source is lost", func(t *testing.T) {
		must(n.StopTimeSource())
		eventually("source", "chronyc -n -c sources | cut -d, -f2", is("?"))
		must(n.StartTimeSource())
		eventually("source", "chronyc -n -c sources | cut -d, -f2", is("*"))
	})
	t.Run("a pod runs", func(t *testing.T) {
		archive := filepath.Join(t.TempDir(), "trivial.tar")
		must(BuildPauseImage(ctx, archive, "localhost/trivial:test"))
		must(n.LoadImage(ctx, archive))
		if _, err := cp.Kubectl(ctx, "run", "trivial", "--image=localhost/trivial:test", "--image-pull-policy=Never"); err != nil {
			t.Fatal(err)
		}
		if _, err := cp.Kubectl(ctx, "wait", "--for=condition=Ready", "pod/trivial", "--timeout=2m"); err != nil {
			t.Fatal(err)
		}
		// Logs come from the kubelet through the API server.
		if _, err := cp.Kubectl(ctx, "logs", "trivial"); err != nil {
			t.Error(err)
		}
	})
	must(n.Stop())
	must(cp.Stop())
	if left := children(t, os.Getpid()); len(left) > len(before) {
		t.Errorf("still running after Stop: %v", left)
	}
}

func listNodes(t *testing.T, cp *ControlPlane, token string) int {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, cp.Server()+"/api/v1/nodes", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	// The administrator's client would authenticate by its certificate.
	transport := cp.client.Transport.(*http.Transport).Clone()
	transport.TLSClientConfig.Certificates = nil
	transport.DisableKeepAlives = true
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode
}

// children are the processes whose parent is pid, by number and name.
func children(t *testing.T, pid int) map[int]string {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	found := map[int]string{}
	for _, path := range stats {
		data, err := os.ReadFile(path)
		if err != nil {
			continue // it ended
		}
		// The name is in parentheses and may contain anything.
		s := string(data)
		open, end := strings.IndexByte(s, '('), strings.LastIndexByte(s, ')')
		fields := strings.Fields(s[end+1:])
		if fields[1] != strconv.Itoa(pid) {
			continue
		}
		child, err := strconv.Atoi(strings.TrimSpace(s[:open]))
		if err != nil {
			t.Fatal(err)
		}
		found[child] = s[open+1 : end]
	}
	return found
}
