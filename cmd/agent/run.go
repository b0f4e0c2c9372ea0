package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/hosthygiene/agent/pkg/config"
	"github.com/hosthygiene/agent/pkg/engine"
	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/remedy"
	"github.com/hosthygiene/agent/pkg/report"
	"github.com/hosthygiene/agent/pkg/watch"
)

type daemon struct {
	*common
	nodeName      string
	kubeconfig    string
	metricsAddr   string
	webConfig     string
	healthAddr    string
	socket        string
	pprofSocket   string
	nfdFile       string
	logFormat     string
	logLevel      slog.Level
	livenessLimit time.Duration
	allowRemedies bool
}

func newRun(c *common) *cobra.Command {
	d := daemon{common: c, livenessLimit: time.Minute}
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run as the node's agent: check again and again, and report to the cluster",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if d.root != "" {
				return exitError{exitUsage, errors.New("--root is for a tree at rest; run needs a running host")}
			}
			if d.observe && d.allowRemedies {
				return exitError{exitUsage, fmt.Errorf("--allow-remedies: %w", errObserves)}
			}
			return d.run(cmd.Context())
		},
	}
	f := cmd.Flags()
	f.StringVar(&d.nodeName, "node-name", os.Getenv("NODE_NAME"), "`name` of this Node; $NODE_NAME")
	f.StringVar(&d.kubeconfig, "kubeconfig", "", "`file` to reach the API server with, outside a pod")
	f.StringVar(&d.metricsAddr, "metrics-address", ":20266", "`address` of /metrics; empty for none")
	f.StringVar(&d.webConfig, "web.config.file", "", "`file` that asks for TLS, client certificates or passwords on /metrics, as Prometheus exporters have it")
	f.StringVar(&d.healthAddr, "health-address", "127.0.0.1:20267", "`address` of /healthz and /readyz")
	f.StringVar(&d.socket, "socket", agentSocket, "unix socket for agent explain; empty for none")
	f.StringVar(&d.pprofSocket, "pprof-socket", "", "unix `socket` for /debug/pprof/, for root only; empty for none")
	f.StringVar(&d.nfdFile, "nfd-features-file", "", "`file` that tells node-feature-discovery the conditions, as labels of the Node; empty for none")
	f.StringVar(&d.logFormat, "log-format", "text", "text or json")
	f.BoolVar(&d.allowRemedies, "allow-remedies", false, "let remedies.mode enforce change this host")
	f.TextVar(&d.logLevel, "log-level", slog.LevelInfo, "debug, info, warn or error")
	return cmd
}

func (d *daemon) run(ctx context.Context) error {
	if d.nodeName == "" {
		return exitError{exitUsage, errNoNode}
	}
	log, err := d.logger()
	if err != nil {
		return err
	}
	log.Info("starting", "version", version, "node", d.nodeName)
	if os.Getenv("GOGC") == "" {
		// The agent's memory is paid on every node: half the garbage, for more
		// collections of a heap of a few megabytes.
		debug.SetGCPercent(50)
	}
	if d.pprofSocket == "" {
		// Where allocations come from is of use to a profile only, and kept in a
		// table of 1.4 MB of which each place that allocates touches another page.
		runtime.MemProfileRate = 0
	}
	if err := host.SmallPages(); err != nil {
		log.Debug("huge pages stay on", "error", err)
	}
	lagTimers()
	reserveThreads(maxParallel, spareThreads)
	var view *host.Host
	view, err = host.Open(host.Options{Observe: d.observe, Kubelet: kubeletClient(d.nodeName, func() host.View { return view })})
	if err != nil {
		return exitError{exitFinding, err}
	}
	defer view.Close()
	o, err := view.OS(ctx)
	if err != nil {
		log.Warn("the operating system is not known", "error", err)
	}
	configs, err := restConfigs(d.kubeconfig, view)
	if err != nil {
		return exitError{exitUsage, fmt.Errorf("no way to the API server: %w", err)}
	}
	api, err := report.NewAPI(d.nodeName, configs...)
	if err != nil {
		return exitError{exitUsage, err}
	}

	settings := &settings{log: log}
	publisher := report.NewPublisher(api, d.nodeName, o.BootTime, log, settings.setLabels)
	metrics := report.NewMetrics(version, api.Writes)
	var latest latestSnapshot
	var eng *engine.Engine
	wake := func(ctx context.Context, probe string) { eng.Wake(ctx, probe) }
	watcher := watch.New(view, log, wake)
	// What the agent before us told must be known before the first judgement,
	// or a held-back problem would clear and come again, and before the config
	// of this node is put together from its labels. The first looks at the host
	// need not wait for it. Without the API server nothing can flicker either.
	known := sync.OnceFunc(func() {
		patience, giveUp := context.WithTimeout(ctx, 5*time.Second)
		defer giveUp()
		publisher.WaitKnown(patience)
	})
	prior := func(condition string) bool { known(); return publisher.Prior(condition) }
	settings.awaitLabels = known
	var remedies *remedy.Controller
	reporters := []engine.Reporter{publisher, metrics, &latest}
	var features *report.Features
	if d.nfdFile != "" {
		features = report.NewFeatures(d.nfdFile, log)
		reporters = append(reporters, features)
	}
	if d.observe {
		log.Info("this agent only observes: no remedy is planned or done, whatever the config says")
		eng = engine.New(view, log, prior, append(reporters, &observer{tell: publisher.Tell, log: log}, watcher)...)
	} else {
		remedies = d.remedies(view, api, publisher, log, wake)
		metrics.Remedies = remedies.Counts
		eng = engine.New(view, log, prior, append(reporters, remedies, watcher)...)
		eng.Annotate = remedies.Attempt
	}
	eng.Cluster = report.NewCluster(publisher, api, known)
	settings.configure = func(cfg *config.Sections, err error) { eng.Configure(ctx, cfg, err) }

	var running sync.WaitGroup
	asked := ctx
	// The first that fails ends all the others; nobody who fails after it waits.
	ctx, fail := context.WithCancelCause(ctx)
	defer running.Wait()
	defer fail(nil)
	ended := func() error {
		if asked.Err() == nil {
			return exitError{exitFinding, context.Cause(ctx)}
		}
		log.Info("stopping")
		return nil
	}
	serve := func(l net.Listener, server *http.Server) {
		running.Go(func() {
			if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				fail(err)
			}
		})
		running.Go(func() { <-ctx.Done(); server.Close() })
	}
	listen := func(address string, h http.Handler) error {
		if address == "" {
			return nil
		}
		// What dies unseen ends with the server's timeouts: no four system calls
		// for each question of the kubelet's, and no timer.
		l, err := (&net.ListenConfig{KeepAlive: -1}).Listen(ctx, "tcp", address)
		if err != nil {
			return exitError{exitFinding, fmt.Errorf("listening on %s: %w", address, err)}
		}
		serve(l, newServer(h, log))
		return nil
	}
	var yielded yielded
	serveHealth := func() error { return listen(d.healthAddr, d.health(eng, publisher, &yielded)) }
	healthy := false
	claim, err := claimHost(ctx, view, log, func(to error) {
		if yielded.to.Swap(&to) == nil {
			// The other one may have the port, and then nobody can be answered.
			healthy = serveHealth() == nil
		}
	})
	switch {
	case ctx.Err() != nil:
		return ended()
	case err != nil:
		log.Warn("whether another agent runs on this node can not be told", "error", err)
	case claim.Despite != "":
		claim.Close()
		running.Go(func() {
			if err := inherit(ctx, view); err != nil {
				fail(err)
			}
		})
	default:
		defer claim.Close()
	}
	yielded.to.Store(nil)
	if !healthy {
		if err := serveHealth(); err != nil {
			return err
		}
	}
	switch {
	case d.metricsAddr == "":
	case d.webConfig == "":
		if err := listen(d.metricsAddr, metricsHandler(metrics)); err != nil {
			return err
		}
	default:
		protected := protectedMetrics{address: d.metricsAddr, config: d.webConfig, every: time.Minute, retry: 10 * time.Second,
			handler: metricsHandler(metrics), log: log, tell: publisher.Tell}
		running.Go(func() {
			if err := protected.run(ctx); err != nil {
				fail(err)
			}
		})
	}
	if d.socket != "" {
		if l, err := listenSocket(d.socket); err != nil {
			log.Warn("agent explain will not find this agent", "error", err)
		} else {
			serve(l, newServer(d.explainHandler(ctx, view, &latest), log))
		}
	}
	if d.pprofSocket != "" {
		if l, err := listenSocket(d.pprofSocket); err != nil {
			log.Warn("there will be no profiles", "error", err)
		} else {
			server := newServer(pprofHandler(), log)
			server.WriteTimeout = 5 * time.Minute // a profile is written when its time is over
			serve(l, server)
		}
	}

	running.Go(func() { publisher.Run(ctx) })
	running.Go(func() {
		select {
		case <-publisher.Reported():
			// The first pass reads what later ones remember, the package
			// database above all; what it took is not needed again.
			debug.FreeOSMemory()
			settle()
			if err := host.UnmapProgram(); err != nil {
				log.Debug("what only the start needed of the program stays resident", "error", err)
			}
		case <-ctx.Done():
		}
	})
	running.Go(func() { eng.Run(ctx) })
	running.Go(func() { watcher.Run(ctx) })
	running.Go(func() { settings.follow(ctx, d.config) })
	if features != nil {
		running.Go(func() { features.Run(ctx) })
	}
	if remedies != nil {
		running.Go(func() { remedies.Run(ctx) })
	}
	<-ctx.Done()
	return ended()
}

// claims is what gives a process its claim on the host.
type claims interface {
	Claim(ctx context.Context, dir string) (*host.Claim, error)
}

const (
	// claimEvery is how often an agent that waits for another one's end looks.
	claimEvery = time.Second
	// strangerEvery is how often one at work looks whether the stranger that holds
	// the claim has let go. At first it is claimEvery: one that was killed lets go
	// in seconds, and another agent may start in its place.
	strangerEvery = 10 * time.Second
	// orphanAfter is for how long a process that has ended must hold the claim to
	// be taken for one that hangs: each that is killed is a zombie for a moment
	// before it lets go, which is seconds where the processor is busy.
	orphanAfter = 15 * time.Second
)

// claimHost waits until this is the only agent of the node: two that each write
// what they find would take turns at every difference between them. yield is
// told to whom it waits, again and again. Another error says that it can not be
// found out, such as without the folder.
func claimHost(ctx context.Context, h claims, log *slog.Logger, yield func(to error)) (*host.Claim, error) {
	waiting := false
	var orphan time.Time
	for {
		c, err := h.Claim(ctx, remedy.StateDir)
		if err == nil && c.Orphaned != 0 {
			if orphan.IsZero() {
				orphan = time.Now()
			}
		} else {
			orphan = time.Time{}
		}
		var held *host.ClaimedError
		switch {
		case err == nil && c.Orphaned != 0 && time.Since(orphan) < orphanAfter:
			c.Close()
			err = &host.ClaimedError{Dir: remedy.StateDir, PID: c.Orphaned}
		case err == nil && c.Despite != "":
			log.Warn("the lock on "+remedy.StateDir+" is held, but by no agent", "holder", c.Despite)
			return c, nil
		case err == nil:
			if waiting {
				log.Info("the other agent has ended, this one goes on")
			}
			return c, nil
		case !errors.As(err, &held):
			return nil, err
		case !waiting:
			waiting = true
			log.Error("another agent runs on this node: this one waits until it ends, and tells nothing", "error", err)
		}
		yield(err)
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(claimEvery):
		}
	}
}

// inherit takes the claim over from one that is no agent when it lets go, and
// holds it until ctx ends. Until then any agent that starts may get it as well:
// that another one has is the error.
func inherit(ctx context.Context, h claims) error {
	began := time.Now()
	for {
		c, err := h.Claim(ctx, remedy.StateDir)
		var held *host.ClaimedError
		switch {
		case err == nil && c.Despite == "":
			<-ctx.Done()
			return c.Close()
		case err == nil:
			c.Close()
		case errors.As(err, &held):
			return fmt.Errorf("another agent has taken this node over: %w", err)
		}
		every := claimEvery
		if time.Since(began) >= orphanAfter {
			every = strangerEvery
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(every):
		}
	}
}

// yielded is to whom this agent has left the node, if to anybody.
type yielded struct{ to atomic.Pointer[error] }

func (d *daemon) logger() (*slog.Logger, error) {
	opts := &slog.HandlerOptions{Level: d.logLevel}
	switch d.logFormat {
	case "text":
		return slog.New(slog.NewTextHandler(report.Escape(os.Stderr), opts)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(report.Escape(os.Stderr), opts)), nil
	}
	return nil, exitError{exitUsage, fmt.Errorf("--log-format %s: want text or json", d.logFormat)}
}

// settings joins the two things the config in force depends on: the file, and
// the node's labels that select overrides in it.
type settings struct {
	log       *slog.Logger
	configure func(*config.Sections, error)
	// awaitLabels returns when the node's labels are known, or no longer awaited.
	awaitLabels func()

	mu     sync.Mutex
	file   *config.Config // the last good one
	err    error          // why the newest is not in force
	read   bool
	labels map[string]string
	// force is what was configured last: it stays when overrides that match
	// this node contradict each other.
	force *config.Sections
}

func (s *settings) follow(ctx context.Context, file string) {
	if file == "" {
		s.changed(new(config.Config), nil)
		<-ctx.Done()
		return
	}
	config.Watch(ctx, file, s.changed)
}

func (s *settings) changed(c *config.Config, err error) {
	if err == nil && c.Overrides() > 0 {
		s.awaitLabels()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.read, s.err = true, err
	switch {
	case err == nil:
		s.file = c
		s.log.Info("config read")
	case s.file == nil:
		s.log.Error("config refused, running with the defaults", "error", err)
	default:
		s.log.Error("config refused, the last good one stays in force", "error", err)
	}
	s.apply()
}

// setLabels says whether they put another config into force.
func (s *settings) setLabels(labels map[string]string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.labels = labels
	if !s.read || s.file == nil || s.file.Overrides() == 0 {
		return false
	}
	s.apply()
	return true
}

func (s *settings) apply() {
	err := s.err
	if s.file != nil {
		own, nodeErr := s.file.ForNode(s.labels)
		if nodeErr == nil {
			s.force = &own.Sections
		} else if err == nil {
			err = nodeErr
			s.log.Error("overrides refused, the last good config stays in force", "error", err)
		}
	}
	if s.force == nil {
		s.force = &config.Default().Sections
	}
	s.configure(s.force, err)
}

// latestSnapshot keeps what agent explain shows.
type latestSnapshot struct {
	atomic.Pointer[engine.Snapshot]
}

// Report implements [engine.Reporter].
func (l *latestSnapshot) Report(s engine.Snapshot) { l.Store(&s) }

func (d *daemon) health(eng *engine.Engine, p *report.Publisher, y *yielded) http.Handler {
	mux := http.NewServeMux()
	// Liveness is the scheduler's answer: a probe that hangs on a dead mount has
	// a thread that no restart can end.
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if y.to.Load() != nil { // nothing is scheduled yet
			fmt.Fprintln(w, "ok")
			return
		}
		if age := eng.Stalled(); age > d.livenessLimit {
			http.Error(w, fmt.Sprintf("the scheduler has not come round for %s", age.Round(time.Second)), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /readyz", ready(p.Reported(), y))
	return mux
}

// readyPatience is how long an answer about readiness waits for the first pass:
// the kubelet asks when the agent has started, and then half a minute later. It
// waits 10 s for an answer.
const readyPatience = 5 * time.Second

func ready(reported <-chan struct{}, y *yielded) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if to := y.to.Load(); to != nil {
			http.Error(w, fmt.Sprintf("another agent runs on this node: %v", *to), http.StatusServiceUnavailable)
			return
		}
		patience, giveUp := context.WithTimeout(r.Context(), readyPatience)
		defer giveUp()
		select {
		case <-reported:
			fmt.Fprintln(w, "ok")
		case <-patience.Done():
			http.Error(w, "the first pass has not been reported yet", http.StatusServiceUnavailable)
		}
	}
}

// listenSocket listens on a unix socket that only the user of this process may
// connect to, in place of one that a dead predecessor left behind.
func listenSocket(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	switch info, err := os.Lstat(path); {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return nil, err
	case info.Mode().Type() != os.ModeSocket:
		return nil, fmt.Errorf("%s is in the way: it is no socket", path)
	default:
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	// bind(2) gives the file the mode of the socket, less the umask (unix_bind in
	// net/unix/af_unix.c): there is no moment at which it is open to others.
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var mode error
		err := c.Control(func(fd uintptr) { mode = syscall.Fchmod(int(fd), 0o600) })
		return errors.Join(err, mode)
	}}
	return config.Listen(context.Background(), "unix", path)
}

// pprofHandler names its pages one by one. That importing the package also puts
// them into http.DefaultServeMux is of no effect: nothing here serves that.
func pprofHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /debug/pprof/", pprof.Index) // and heap, goroutine, ... below it
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	return mux
}

func (d *daemon) explainHandler(ctx context.Context, view host.View, latest *latestSnapshot) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /explain/{probe}", func(w http.ResponseWriter, r *http.Request) {
		snap := latest.Load()
		name := r.PathValue("probe")
		if snap == nil || !slices.Contains(probeNames(), name) {
			http.Error(w, "not known", http.StatusNotFound)
			return
		}
		settings, err := settingsOf(snap.Config, name)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		o, err := view.OS(ctx)
		if err != nil {
			o = host.OS{ID: "unknown"}
		}
		hr := report.NewHostReport(d.nodeName, version, o, time.Now(), snap.Reports)
		hr.Probes = slices.DeleteFunc(hr.Probes, func(p report.ProbeReport) bool { return p.Name != name })
		w.Header().Set("Content-Type", "application/json")
		e := explanation{Report: hr, Settings: settings, From: "the running agent"}
		e.detail(ctx, view, snap.Config, name)
		if err := json.NewEncoder(w).Encode(e); err != nil {
			return // the asker is gone
		}
	})
	return mux
}

func indentYAML(data json.RawMessage) (string, error) {
	var out, b strings.Builder
	if err := report.WriteYAML(&out, data); err != nil {
		return "", err
	}
	for line := range strings.Lines(out.String()) {
		b.WriteString("  " + line)
	}
	return b.String(), nil
}
