package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

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
	healthAddr    string
	socket        string
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
	f.StringVar(&d.healthAddr, "health-address", "127.0.0.1:20267", "`address` of /healthz and /readyz")
	f.StringVar(&d.socket, "socket", agentSocket, "unix socket for agent explain; empty for none")
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
	lagTimers()
	var view *host.Host
	view, err = host.Open(host.Options{Observe: d.observe, Kubelet: kubeletClient(func() host.Files { return view })})
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
	reporters := []engine.Reporter{publisher, metrics, &latest, watcher}
	var remedies *remedy.Controller
	if d.observe {
		log.Info("this agent only observes: no remedy is planned or done, whatever the config says")
		eng = engine.New(view, log, publisher.Prior, append(reporters, &observer{tell: publisher.Tell, log: log})...)
	} else {
		remedies = d.remedies(view, api, publisher, log, wake)
		metrics.Remedies = remedies.Counts
		eng = engine.New(view, log, publisher.Prior, append(reporters, remedies)...)
		eng.Annotate = remedies.Attempt
	}
	settings.configure = func(cfg *config.Sections, err error) { eng.Configure(ctx, cfg, err) }

	var running sync.WaitGroup
	failed := make(chan error, 4)
	serve := func(network, address string, h http.Handler) error {
		if address == "" {
			return nil
		}
		l, err := net.Listen(network, address)
		if err != nil {
			return exitError{exitFinding, fmt.Errorf("listening on %s: %w", address, err)}
		}
		server := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second,
			WriteTimeout: 30 * time.Second, MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug)}
		running.Go(func() {
			if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				failed <- err
			}
		})
		running.Go(func() { <-ctx.Done(); server.Close() })
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer running.Wait()
	defer cancel()
	if err := serve("tcp", d.healthAddr, d.health(eng, publisher)); err != nil {
		return err
	}
	if err := serve("tcp", d.metricsAddr, metricsHandler(metrics)); err != nil {
		return err
	}
	if d.socket != "" {
		if err := serveSocket(d.socket, func() error { return serve("unix", d.socket, d.explainHandler(ctx, view, &latest)) }); err != nil {
			log.Warn("agent explain will not find this agent", "error", err)
		}
	}

	running.Go(func() { publisher.Run(ctx) })
	running.Go(func() {
		select {
		case <-publisher.Reported():
			// The first pass reads what later ones remember, the package
			// database above all; what it took is not needed again.
			debug.FreeOSMemory()
		case <-ctx.Done():
		}
	})
	// What the agent before us told must be known before the first judgement,
	// or a held-back problem would clear and come again. Without the API server
	// nothing can flicker either.
	known, giveUp := context.WithTimeout(ctx, 5*time.Second)
	publisher.WaitKnown(known)
	giveUp()
	running.Go(func() { eng.Run(ctx) })
	running.Go(func() { watcher.Run(ctx) })
	running.Go(func() { settings.follow(ctx, d.config) })
	if remedies != nil {
		running.Go(func() { remedies.Run(ctx) })
	}
	select {
	case <-ctx.Done():
		log.Info("stopping")
		return nil
	case err := <-failed:
		return exitError{exitFinding, err}
	}
}

func (d *daemon) logger() (*slog.Logger, error) {
	opts := &slog.HandlerOptions{Level: d.logLevel}
	switch d.logFormat {
	case "text":
		return slog.New(slog.NewTextHandler(os.Stderr, opts)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(os.Stderr, opts)), nil
	}
	return nil, exitError{exitUsage, fmt.Errorf("--log-format %s: want text or json", d.logFormat)}
}

// settings joins the two things the config in force depends on: the file, and
// the node's labels that select overrides in it.
type settings struct {
	log       *slog.Logger
	configure func(*config.Sections, error)

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

func (s *settings) setLabels(labels map[string]string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.labels = labels
	if s.read && s.file != nil && s.file.Overrides() > 0 {
		s.apply()
	}
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

func (d *daemon) health(eng *engine.Engine, p *report.Publisher) http.Handler {
	mux := http.NewServeMux()
	// Liveness is the scheduler's answer: a probe that hangs on a dead mount has
	// a thread that no restart can end.
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if age := eng.Stalled(); age > d.livenessLimit {
			http.Error(w, fmt.Sprintf("the scheduler has not come round for %s", age.Round(time.Second)), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		select {
		case <-p.Reported():
			fmt.Fprintln(w, "ok")
		default:
			http.Error(w, "the first pass has not been reported yet", http.StatusServiceUnavailable)
		}
	})
	return mux
}

func metricsHandler(m *report.Metrics) http.Handler {
	reg := prometheus.NewRegistry()
	reg.MustRegister(m, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	return mux
}

// serveSocket replaces a socket that a dead predecessor left behind.
func serveSocket(path string, listen func() error) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := listen(); err != nil {
		return err
	}
	return os.Chmod(path, 0o600)
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
		if err := json.NewEncoder(w).Encode(explanation{hr, settings, "the running agent"}); err != nil {
			return // the asker is gone
		}
	})
	return mux
}

func indentYAML(data json.RawMessage) (string, error) {
	out, err := yaml.JSONToYAML(data)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	for line := range strings.Lines(string(out)) {
		b.WriteString("  " + line)
	}
	return b.String(), nil
}
