package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"

	"github.com/hosthygiene/agent/pkg/cluster"
	"github.com/hosthygiene/agent/pkg/fleet"
	"github.com/hosthygiene/agent/pkg/terminal"
)

func newIdentities(c *common) *cobra.Command {
	var output, selector string
	var parallel int
	cmd := &cobra.Command{
		Use:   "identities",
		Short: "Find names that several nodes have and only one may: machine-id, product UUID, initiator names",
		Long: `identities compares what nodes are known by: machine-id and product UUID as the
kubelets publish them, initiator names that CSI drivers use as node IDs, and
the hashes in the metrics of every agent, each asked through the API server.
That takes the right to get pods/proxy in the agent's namespace; what could not
be asked is told. Identities are shown as hashes only.

Two nodes with one iSCSI initiator name or NVMe host NQN are one machine to the
storage system: each can take the other's volumes away, or write to them.

Exit codes: 0 nothing is double; 1 something is; 2 usage, or nobody answers; 3
nothing double known, but not every node could be asked.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			if parallel < 1 {
				return exitError{exitUsage, errors.New("--parallel: want 1 or more")}
			}
			client, err := c.client()
			if err != nil {
				return err
			}
			p := c.progress(cmd, client, output, "asking the API server")
			defer p.Done()
			r, err := c.identities(cmd.Context(), client, selector, parallel, p)
			p.Done()
			if err != nil {
				return exitError{exitUsage, err}
			}
			return c.show(r, output)
		},
	}
	outputFlag(cmd, &output)
	cmd.Flags().StringVarP(&selector, "selector", "l", "", "compare only nodes with these `labels`")
	cmd.Flags().IntVar(&parallel, "parallel", 8, "how many agents to ask at a time")
	return cmd
}

func (c *common) identities(ctx context.Context, client *cluster.Client, selector string, parallel int, p *terminal.Progress) (fleet.IdentityReport, error) {
	var not []string
	nodes, err := client.Nodes(ctx, selector)
	if err != nil {
		return fleet.IdentityReport{}, err
	}
	known := map[string]fleet.Identities{}
	for _, n := range nodes {
		known[n.Name] = fleet.IdentitiesOfNode(n)
	}
	csi, err := client.CSINodes(ctx)
	if err != nil {
		not = append(not, err.Error())
	}
	for _, n := range csi {
		if known[n.Name] != nil {
			maps.Copy(known[n.Name], fleet.IdentitiesOfDrivers(n))
		}
	}
	pods, err := client.AgentPods(ctx, c.namespace, "")
	if err != nil {
		not = append(not, err.Error())
	}
	type answer struct {
		ids fleet.Identities
		err error
	}
	answers := make([]answer, len(pods))
	slots := make(chan struct{}, parallel)
	var wg sync.WaitGroup
	var answered atomic.Int64
	p.Follow(func() string {
		return fmt.Sprintf("asking the agents for their metrics: %d of %d", answered.Load(), len(pods))
	})
	for i, p := range pods {
		if known[p.Spec.NodeName] == nil || p.Status.Phase != corev1.PodRunning {
			answered.Add(1)
			continue
		}
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots; answered.Add(1) }()
			body, err := client.Metrics(ctx, p.Namespace, p.Name)
			if err != nil {
				answers[i].err = err
				return
			}
			defer body.Close()
			answers[i].ids, answers[i].err = fleet.IdentitiesOfMetrics(body)
		})
	}
	wg.Wait()
	asked := map[string]bool{}
	for i, p := range pods {
		switch a := answers[i]; {
		case a.err != nil:
			not = append(not, fmt.Sprintf("the metrics of the agent on %s: %v", p.Spec.NodeName, a.err))
		case a.ids != nil:
			asked[p.Spec.NodeName] = true
			maps.Copy(known[p.Spec.NodeName], a.ids)
		}
	}
	if missing := len(known) - len(asked); missing > 0 {
		not = append(not, fmt.Sprintf("initiator names of %s", plural(missing, "node", "whose agent did not answer")))
	}
	return fleet.NewIdentityReport(known, not, time.Now()), nil
}

func plural(n int, what, rest string) string {
	if n != 1 {
		what += "s"
	}
	return strings.TrimSpace(fmt.Sprintf("%d %s %s", n, what, rest))
}
