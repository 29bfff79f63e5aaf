package scale

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"runtime"
	"strconv"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/spf13/cobra"
)

const (
	loopback     = "127.0.0.1"
	user         = "bench"
	startTimeout = 20 * time.Second
	maxStore     = 8 << 30
)

// A nodeSpec is what a node of the cluster is told.
type nodeSpec struct {
	Name     string `json:"name"`
	Dir      string `json:"dir"`      // for its streams
	Password string `json:"password"` // of clients and routes
	Routes   []int  `json:"routes"`   // ports of the other nodes
}

type nodePorts struct {
	Client int `json:"client"`
	Routes int `json:"routes"`
}

type nodeQuestion struct {
	Collect bool `json:"collect"` // garbage first, so that Heap is what is in use
}

// nodeStats counts from the start of the node.
type nodeStats struct {
	Heap      int64 `json:"heap"`
	In        int64 `json:"in"`
	Out       int64 `json:"out"` // bytes of messages, without the protocol around them
	ClientIn  int64 `json:"client_in"`
	ClientOut int64 `json:"client_out"` // those of clients; the rest is between nodes
}

func nodeCommand() *cobra.Command {
	return &cobra.Command{
		Use: "node", Hidden: true, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			in, out := json.NewDecoder(cmd.InOrStdin()), cmd.OutOrStdout()
			var spec nodeSpec
			if err := in.Decode(&spec); err != nil {
				return err
			}
			srv, err := server.NewServer(spec.options())
			if err != nil {
				return err
			}
			srv.Start()
			defer srv.WaitForShutdown()
			defer srv.Shutdown()
			if !srv.ReadyForConnections(startTimeout) {
				return errors.New("the server does not start")
			}
			addr, ok := srv.Addr().(*net.TCPAddr)
			if !ok {
				return fmt.Errorf("the server listens on %v", srv.Addr())
			}
			if err := json.NewEncoder(out).Encode(nodePorts{addr.Port, srv.ClusterAddr().Port}); err != nil {
				return err
			}
			return serve(in, out, func(q nodeQuestion) (any, error) { return statsOf(srv, q) })
		},
	}
}

func statsOf(srv *server.Server, q nodeQuestion) (nodeStats, error) {
	v, err := srv.Varz(nil)
	if err != nil {
		return nodeStats{}, err
	}
	s := nodeStats{In: v.InBytes, Out: v.OutBytes, ClientIn: v.InClientBytes, ClientOut: v.OutClientBytes}
	if q.Collect {
		runtime.GC() // twice, for what is in pools
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		s.Heap = int64(m.HeapAlloc) //nolint:gosec // far below the largest
	}
	return s, nil
}

func (s nodeSpec) options() *server.Options {
	o := &server.Options{
		ServerName: s.Name, Host: loopback, Port: server.RANDOM_PORT, NoLog: true, NoSigs: true,
		Users:     []*server.User{{Username: user, Password: s.Password}},
		JetStream: true, StoreDir: s.Dir, JetStreamMaxStore: maxStore,
		Cluster: server.ClusterOpts{
			Name: "scale", Host: loopback, Port: server.RANDOM_PORT, Username: user, Password: s.Password,
		},
	}
	for _, port := range s.Routes {
		o.Routes = append(o.Routes, &url.URL{
			Scheme: "nats-route", User: url.UserPassword(user, s.Password), Host: net.JoinHostPort(loopback, strconv.Itoa(port)),
		})
	}
	return o
}
