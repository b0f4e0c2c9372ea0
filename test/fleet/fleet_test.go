//go:build cluster

package main

import (
	"bufio"
	"encoding/json"
	"io"
	"log/slog"
	"net/url"
	"os"
	"testing"
	"time"
)

// TestFleet is the short form of what make bench-fleet measures. It looks at
// counts and at no clock: what each agent sends for each thing that happens, by
// the API server's own audit log.
func TestFleet(t *testing.T) {
	ctx := t.Context()
	const nodes = 100
	manifests, err := manifestsDir()
	if err != nil {
		t.Fatal(err)
	}
	f, err := newFleet(ctx, t.TempDir(), population{nodes: nodes, pass: time.Millisecond}, manifests, slog.New(slog.NewTextHandler(testWriter{t}, nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.stop(); err != nil {
			t.Error(err)
		}
	})
	log := audit{t: t, path: f.cp.AuditLog(), seen: map[string]map[string]int{}}
	want := map[string]int{}
	step := func(name string, run func() error, more map[string]int) {
		t.Helper()
		if err := run(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for what, n := range more {
			want[what] += n
		}
		log.until(f, want)
		if bad := f.record.Load().count("", func(code int) bool { return !ok(code) }); bad > 0 || t.Failed() {
			t.Fatalf("%s: %d requests came to nothing: %s", name, bad, f.record.Load())
		}
	}
	says := func(status string) {
		t.Helper()
		if n, err := f.saying(ctx, status); err != nil || n != nodes {
			t.Fatalf("%d of %d nodes say %s=%s: %v", n, nodes, timeProblem, status, err)
		}
	}

	step("install", func() error { return f.start(ctx, time.Second) }, map[string]int{"list nodes": 1, "watch nodes": 1, "patch nodes/status": 1})
	says("False")
	step("numbers move", func() error {
		f.each(func(a *agent) {
			for i := range 20 {
				a.life.publisher.Report(a.snapshot(2000 + i))
				time.Sleep(10 * time.Millisecond)
			}
		})
		return nil
	}, nil)
	step("all nodes lose time", func() error { return f.flip(ctx, nodes, time.Second) }, map[string]int{"patch nodes/status": 1, "create events": 1})
	says("True")
	step("all nodes regain time", func() error {
		f.record.Store(newRecord())
		return f.flip(ctx, nodes, time.Second)
	}, map[string]int{"patch nodes/status": 1, "create events": 1})
	says("False")
	step("rollout restart", func() error {
		f.record.Store(newRecord())
		if err := f.rollout(ctx, 0); err != nil {
			return err
		}
		return f.until(ctx, func(r *record) bool { return r.count("watch", ok) >= nodes })
	}, map[string]int{"list nodes": 1, "watch nodes": 1})
	says("False")
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", p)
	return len(p), nil
}

// audit counts the agents' requests by the node that the token names.
type audit struct {
	t      *testing.T
	path   string
	offset int64
	seen   map[string]map[string]int // by node and "verb resource"
}

// until reads until every node has made the requests that are wanted, and
// complains when one has made more or others. The log is written a moment after
// the answer.
func (l *audit) until(f *fleet, want map[string]int) {
	l.t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		l.read()
		missing := ""
		for _, a := range f.agents {
			for what, n := range want {
				if l.seen[a.name][what] < n {
					missing = a.name + ": " + what
				}
			}
		}
		if missing == "" {
			break
		}
		if time.Now().After(deadline) {
			l.t.Fatalf("the audit log still lacks %s: %v, want %v", missing, l.seen, want)
		}
	}
	for _, a := range f.agents {
		for what, n := range l.seen[a.name] {
			if n > want[what] {
				l.t.Errorf("the agent of %s made %d × %s, want %d", a.name, n, what, want[what])
			}
		}
	}
}

func (l *audit) read() {
	l.t.Helper()
	file, err := os.Open(l.path)
	if err != nil {
		l.t.Fatal(err)
	}
	defer file.Close()
	if _, err := file.Seek(l.offset, io.SeekStart); err != nil {
		l.t.Fatal(err)
	}
	for lines := bufio.NewReader(file); ; {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return // the rest is being written
		}
		l.offset += int64(len(line))
		var r struct {
			Verb, RequestURI, Stage, UserAgent string
			User                               struct{ Extra map[string][]string }
			ObjectRef                          struct{ Resource, Subresource, Name string }
			ResponseStatus                     struct{ Code int }
		}
		if err := json.Unmarshal(line, &r); err != nil {
			l.t.Fatalf("audit log: %v: %.200s", err, line)
		}
		// A watch is noted when it starts and when it ends.
		if r.UserAgent != userAgent ||
			r.Verb == "watch" && r.Stage != "ResponseStarted" || r.Verb != "watch" && r.Stage != "ResponseComplete" {
			continue
		}
		if !ok(r.ResponseStatus.Code) {
			l.t.Errorf("%s %s: %d", r.Verb, r.RequestURI, r.ResponseStatus.Code)
		}
		node := ""
		if names := r.User.Extra["authentication.kubernetes.io/node-name"]; len(names) == 1 {
			node = names[0]
		}
		what, about := r.Verb+" "+r.ObjectRef.Resource, r.ObjectRef.Name
		if r.ObjectRef.Subresource != "" {
			what += "/" + r.ObjectRef.Subresource
		}
		if r.ObjectRef.Resource == "nodes" && about == "" {
			if u, err := url.Parse(r.RequestURI); err == nil {
				about = u.Query().Get("fieldSelector")
			}
		}
		if r.ObjectRef.Resource == "nodes" && about != node && about != "metadata.name="+node {
			l.t.Errorf("the token of node %q asks about %q: %s %s", node, about, r.Verb, r.RequestURI)
		}
		if l.seen[node] == nil {
			l.seen[node] = map[string]int{}
		}
		l.seen[node][what]++
	}
}
