package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"

	"github.com/hosthygiene/agent/pkg/cluster"
	"github.com/hosthygiene/agent/pkg/fleet"
	"github.com/hosthygiene/agent/pkg/terminal"
)

// upgrade holds the flags of upgrade-check.
type upgrade struct {
	*common
	to           string
	skip         []string
	patience     time.Duration
	allResources bool
}

// question is one check: what it is called, and how it is answered.
type question struct {
	name   string
	answer func(context.Context, *facts) fleet.Check
}

// facts are what several questions are answered from.
type facts struct {
	client     *cluster.Client
	now        time.Time
	server     string
	target     string
	nodes      []corev1.Node
	report     fleet.Report
	volumesErr error
	servers    []fleet.APIServer
	pages      []fleet.Metrics
	serverErr  error
}

func newUpgradeCheck(c *common) *cobra.Command {
	u := &upgrade{common: c}
	var output string
	var names []string
	for _, q := range u.questions() {
		names = append(names, q.name)
	}
	cmd := &cobra.Command{
		Use:   "upgrade-check",
		Short: "Say whether this cluster is fit to be upgraded, and what to mend before",
		Long: `upgrade-check asks what stands in the way of an upgrade to the next minor
version, and says what to run. Its checks are
` + terminal.Look{Columns: 79}.Wrap(strings.Join(names, ", "), 0) + `.

Every API server is asked directly where its address can be reached from here,
by the name in its certificate; where it can not, that is said. It changes
nothing.

Exit codes, for pipelines: 0 fit; 1 findings; 2 usage, or nobody answers; 3 no
finding, but not everything could be checked (--skip what never can be).`,
		Example: `  kubectl hygiene upgrade-check --to 1.37
  kubectl hygiene upgrade-check -o json --skip api-servers,storage-hashes`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			for _, s := range u.skip {
				if !slices.Contains(names, s) {
					return exitError{exitUsage, fmt.Errorf("--skip %s: want one of %s", s, strings.Join(names, ", "))}
				}
			}
			client, err := c.client()
			if err != nil {
				return err
			}
			p := c.progress(cmd, client, output, "asking the API server")
			defer p.Done()
			r, err := u.check(cmd.Context(), client, p)
			p.Done()
			if err != nil {
				return exitError{exitUsage, err}
			}
			return c.show(r, output)
		},
	}
	outputFlag(cmd, &output)
	cmd.Flags().StringVar(&u.to, "to", "", "the `minor` to be upgraded to, such as 1.37; the next one without")
	cmd.Flags().StringSliceVar(&u.skip, "skip", nil, "`checks` not to make")
	cmd.Flags().DurationVar(&u.patience, "stuck-after", 5*time.Minute, "how long a deletion may take")
	cmd.Flags().BoolVar(&u.allResources, "all-resources", false, "look through every resource for objects stuck in Terminating, not only the usual ones")
	_ = cmd.RegisterFlagCompletionFunc("skip", cobra.FixedCompletions(names, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func (u *upgrade) check(ctx context.Context, client *cluster.Client, p *terminal.Progress) (fleet.UpgradeReport, error) {
	f := &facts{client: client, now: time.Now(), target: strings.TrimPrefix(u.to, "v")}
	var err error
	if f.server, err = client.Version(ctx); err != nil {
		return fleet.UpgradeReport{}, err
	}
	next, err := fleet.NextMinor(f.server)
	if err != nil {
		return fleet.UpgradeReport{}, err
	}
	if f.target == "" {
		f.target = next
	}
	if _, err := fleet.NextMinor(f.target); err != nil {
		return fleet.UpgradeReport{}, fmt.Errorf("--to %s: want a minor such as %s", u.to, next)
	}
	if f.report, f.nodes, f.volumesErr, err = u.report(ctx, client, ""); err != nil {
		return fleet.UpgradeReport{}, err
	}
	if !slices.Contains(u.skip, "api-servers") || !slices.Contains(u.skip, "storage-hashes") {
		p.Say("asking each API server directly")
		f.servers, f.pages, f.serverErr = client.APIServers(ctx)
	}
	r := fleet.UpgradeReport{APIVersion: fleet.APIVersion, Kind: "UpgradeReport", Time: f.now.UTC().Truncate(time.Second), Server: f.server, Target: f.target}
	for _, q := range u.questions() {
		if slices.Contains(u.skip, q.name) {
			r.Checks = append(r.Checks, fleet.Skip(q.name))
			continue
		}
		told(p, client, q.name)
		r.Checks = append(r.Checks, q.answer(ctx, f))
	}
	return r, ctx.Err()
}

// questions are asked in this order: what is cheap and often the matter first.
func (u *upgrade) questions() []question {
	return []question{
		{"nodes", func(_ context.Context, f *facts) fleet.Check { return fleet.CheckNodes(f.nodes, f.report) }},
		{"kubelet-skew", func(_ context.Context, f *facts) fleet.Check {
			servers := []string{f.server}
			for _, s := range f.servers {
				if s.Err == nil {
					servers = append(servers, s.Version)
				}
			}
			c, err := fleet.CheckSkew(f.nodes, servers, f.target)
			if err != nil {
				return fleet.Failed("kubelet-skew", err)
			}
			return c
		}},
		{"kubelet-settings", func(_ context.Context, f *facts) fleet.Check {
			return fleet.CheckProbe("kubelet-settings", "kubelet", f.report)
		}},
		{"reboots", func(_ context.Context, f *facts) fleet.Check { return fleet.CheckReboots(f.nodes, f.report) }},
		{"volumes", func(_ context.Context, f *facts) fleet.Check {
			if f.volumesErr != nil {
				return fleet.Failed("volumes", f.volumesErr)
			}
			return fleet.CheckVolumes(f.report.StuckVolumes, f.now)
		}},
		{"api-servers", func(_ context.Context, f *facts) fleet.Check {
			if f.serverErr != nil {
				return fleet.Failed("api-servers", f.serverErr)
			}
			return fleet.CheckAPIServers(f.servers, f.server)
		}},
		{"storage-hashes", func(_ context.Context, f *facts) fleet.Check {
			if f.serverErr != nil {
				return fleet.Failed("storage-hashes", f.serverErr)
			}
			return fleet.CheckStorageHashes(f.servers)
		}},
		{"migrations", func(ctx context.Context, f *facts) fleet.Check {
			list, served, err := f.client.Migrations(ctx)
			if err != nil {
				return fleet.Failed("migrations", err)
			}
			return fleet.CheckMigrations(served, list)
		}},
		{"stored-versions", func(ctx context.Context, f *facts) fleet.Check {
			crds, err := f.client.CRDs(ctx)
			if err != nil {
				return fleet.Failed("stored-versions", err)
			}
			_, served, _ := f.client.Migrations(ctx) // without, the older way is shown
			return fleet.CheckStoredVersions(crds, served)
		}},
		{"namespaces", func(ctx context.Context, f *facts) fleet.Check {
			list, err := f.client.Namespaces(ctx)
			if err != nil {
				return fleet.Failed("namespaces", err)
			}
			return fleet.CheckNamespaces(list, u.patience, f.now)
		}},
		{"terminating", func(ctx context.Context, f *facts) fleet.Check {
			found, looked, not, err := f.client.Dying(ctx, u.allResources)
			if err != nil {
				return fleet.Failed("terminating", err)
			}
			return fleet.CheckTerminating(found, looked, not, u.patience, f.now)
		}},
		{"deprecated-apis", func(ctx context.Context, f *facts) fleet.Check {
			pages := f.pages
			if len(pages) == 0 {
				pages = append(pages, f.client.Deprecated(ctx))
			}
			return fleet.CheckDeprecated(pages, f.target)
		}},
	}
}
